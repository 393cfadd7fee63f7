"""`alphaadam run`: what it tells launchers, what it refuses, and what Python's start costs under it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphaadam_dist import run

ROOT = Path(__file__).parents[2]


def python(code: str, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python that was started under `alphaadam run`, with a PYTHONPATH that was there before."""
    environment = run.environment({**os.environ, "PYTHONPATH": path, **variables})
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=environment, cwd=path or ROOT, capture_output=True, text=True, timeout=120)


def test_our_folder_stands_first_and_once() -> None:
    once = run.environment({"PYTHONPATH": f"mine{os.pathsep}yours"})
    assert once["PYTHONPATH"].split(os.pathsep) == [run.STARTUP, "mine", "yours"]
    assert run.environment(once) == once
    assert run.environment({}) == {"PYTHONPATH": run.STARTUP}


def test_a_process_that_imports_neither_tool_pays_nothing() -> None:
    done = python("import sys; print(*{'torch', 'numpy', 'typing', 'alphaadam_dist'} & set(sys.modules))")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_sitecustomize_that_is_hidden_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.theirs = __file__")
    done = python("import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__)", str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "sitecustomize.py")] * 2, done.stderr
    (tmp_path / "sitecustomize.py").write_text("1 / 0")
    assert "ZeroDivisionError" in python("", str(tmp_path)).stderr, "Python itself says so"


def tool(folder: Path) -> str:
    """A folder with a Transformers of which only the import matters, and an alphaadam_dist that cannot be imported."""
    for package, text in {"transformers": "", "alphaadam_dist": "raise ImportError('no torch')"}.items():
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text(text)
    (folder / "transformers" / "training_args.py").touch()
    return str(folder)


def test_an_environment_without_the_package_is_told(tmp_path: Path) -> None:
    code, path = "import transformers.training_args; print('imported')", tool(tmp_path)
    done = python(code, path)
    assert done.stdout == "imported\n"
    assert "cannot import alphaadam_dist (no torch)" in done.stderr
    assert "install alphaadam-dist into that environment" in done.stderr
    asked = python(code, path, ALPHAADAM_OPTIM="alphaadam")
    assert asked.returncode == 1, "it would train with another optimizer"
    assert "install alphaadam-dist into that environment" in asked.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("python -I train.py", "-I"),
        ("python3.11 -uE train.py", "-E"),
        ("/usr/bin/python -X dev -W ignore -S train.py", "-S"),
        ("torchrun --no-python python -Xdev -I train.py", "-I"),
        ("python -u train.py -I", None),
        ("python -m module -S", None),
        ("python -c S -S", None),
        ("python -W S train.py", None),
        ("python --version", None),
        ("make -I", None),
    ],
)
def test_what_tells_python_to_skip_us_is_refused(line: str, flag: str | None) -> None:
    if flag is None:
        run.refuse_skipped(line.split())
    else:
        with pytest.raises(ValueError, match=f"with {flag} Python .* Leave out {flag}"):
            run.refuse_skipped(line.split())


def test_a_scripts_first_line_is_read(tmp_path: Path) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/usr/bin/python3 -sE\n")
    script.chmod(0o755)
    with pytest.raises(ValueError, match="/usr/bin/python3 -sE: with -E"):
        run.replace_process([str(script)])
    assert run.shebang(sys.executable) == []


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="there is no command 'no-such-tool'"):
        run.replace_process(["no-such-tool"])


@pytest.fixture
def mpi(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An mpirun that says whose it is."""
    command = tmp_path / "mpirun"
    command.write_text(f"#!/bin/sh\necho '{request.param}'\n")
    command.chmod(0o755)
    return str(command)


VARIABLES = {"ALPHAADAM_OPTIM": "alphaadam", "HOME": "/root"}


@pytest.mark.parametrize("mpi", ["mpirun (Open MPI) 5.0.11"], indirect=True)
def test_open_mpi_is_told_each_name(mpi: str) -> None:
    line = run.told([mpi, "-np", "2", "python", "train.py"], VARIABLES)
    assert line == [mpi, "-x", "PYTHONPATH", "-x", "ALPHAADAM_OPTIM", "-np", "2", "python", "train.py"]


@pytest.mark.parametrize("mpi", ["HYDRA build details:"], indirect=True)
def test_other_mpis_hand_on_everything(mpi: str) -> None:
    assert run.told([mpi, "-np", "2", "python"], VARIABLES) == [mpi, "-np", "2", "python"]


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("srun -n2 x --export=NONE", "srun -n2 x --export=NONE"),
        ("srun --export=NONE x", "srun --export=PYTHONPATH,ALPHAADAM_OPTIM x"),
        ("srun --export A,B=1 x", "srun --export A,B=1,PYTHONPATH,ALPHAADAM_OPTIM x"),
        ("srun --export=ALL,A=1 x", "srun --export=ALL,A=1 x"),
        ("sbatch --export=A x.sbatch", "sbatch --export=A,PYTHONPATH,ALPHAADAM_OPTIM x.sbatch"),
        ("torchrun --export=A x", "torchrun --export=A x"),
    ],
)
def test_slurm_is_told_where_it_hands_on_less_than_all(given: str, then: str) -> None:
    assert run.told(given.split(), VARIABLES) == then.split()


def test_slurms_own_variables_are_told_too() -> None:
    said = run.environment({**VARIABLES, "SLURM_EXPORT_ENV": "NONE", "SBATCH_EXPORT": "ALL"})
    assert said["SLURM_EXPORT_ENV"] == "PYTHONPATH,ALPHAADAM_OPTIM"
    assert said["SBATCH_EXPORT"] == "ALL"
