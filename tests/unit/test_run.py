"""`alphaadam run`: what it tells launchers, what it refuses, and what Python's start costs under it."""

from __future__ import annotations
import __future__

import ast
import os
import shutil
import signal
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
    assert run.environment({}) == run.environment({"PYTHONPATH": ""}) == {"PYTHONPATH": run.STARTUP}


def test_an_empty_entry_is_the_current_folder_as_before(tmp_path: Path) -> None:
    """`export PYTHONPATH=$PYTHONPATH:/mine` leaves one where nothing was before."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text("import helper; print(helper.__file__)")
    (tmp_path / "helper.py").touch()
    environment = run.environment({**os.environ, "PYTHONPATH": f"{os.pathsep}mine"})
    line = [sys.executable, "scripts/train.py"]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "helper.py"), done.stderr


def test_a_process_that_imports_neither_tool_pays_nothing() -> None:
    done = python("import sys; print(*{'torch', 'numpy', 'typing', 'alphaadam_dist'} & set(sys.modules))")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_sitecustomize_that_is_hidden_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.theirs = __file__")
    done = python("import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__)", str(tmp_path))
    assert done.stdout.split() == [str(tmp_path / "sitecustomize.py")] * 2, done.stderr
    (tmp_path / "sitecustomize.py").write_text("1 / 0")
    assert "ZeroDivisionError" in python("", str(tmp_path)).stderr, "Python itself says so"


AS_DDTRACE = """
import os, sys
here = os.path.dirname(os.path.abspath(__file__))
sys.path = [entry for entry in sys.path if os.path.abspath(entry) != here]
del sys.modules["sitecustomize"]
import sitecustomize
sys.path.insert(0, here)
"""


@pytest.mark.parametrize("ours", ["behind ours", "before it"])
@pytest.mark.parametrize("kind", ["another installation", "a tool that does the same"])
def test_chains_of_sitecustomize_end(tmp_path: Path, kind: str, ours: str) -> None:
    """They are run once each, as far as they run each other."""
    other, last = tmp_path / "alphaadam_dist" / "startup", tmp_path / "last"
    shutil.copytree(run.STARTUP, other)
    shutil.copy(Path(run.STARTUP).parent / "import_hook.py", other.parent)
    if kind != "another installation":
        (other / "sitecustomize.py").write_text(AS_DDTRACE)
    last.mkdir()
    (last / "sitecustomize.py").write_text("import sys\nsys.runs = [*getattr(sys, 'runs', ()), __file__]")
    chain = [str(other), run.STARTUP] if ours == "before it" else [run.STARTUP, str(other)]
    path = os.pathsep.join([*chain, str(last)])
    line = [sys.executable, "-c", "import sys; print(sys.runs)"]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{[str(last / 'sitecustomize.py')]}\n", "")


@pytest.mark.parametrize("file", ["startup/sitecustomize.py", "import_hook.py"])
def test_an_older_python_can_read_what_it_runs(file: str) -> None:
    """The system's own, say, of which there is none here: 3.7 has the grammar, and looks at no annotation."""
    text = (ROOT / "alphaadam_dist" / file).read_text()
    ast.parse(text, feature_version=(3, 7))
    assert compile(text, file, "exec", dont_inherit=True).co_flags & __future__.annotations.compiler_flag


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


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("env PYTHONPATH=/mine torchrun train.py", True),
        ("mpirun -x PYTHONPATH=/mine python train.py", True),
        ("srun --export=ALL,PYTHONPATH=/mine python train.py", True),
        ("bash -c|cd /mine; PYTHONPATH=. torchrun train.py", True),
        ("bash -c|export PYTHONPATH=.:$PYTHONPATH; torchrun train.py", False),
        ("bash -c|PYTHONPATH=${PYTHONPATH}:. torchrun train.py", False),
        ("mpirun -x PYTHONPATH python train.py", False),
        ("python train.py --NOT_PYTHONPATH=1", False),
    ],
)
def test_a_path_that_would_stand_in_place_of_ours_is_refused(line: str, refused: bool) -> None:
    first, *rest = line.split("|")
    words = [*first.split(), *rest]
    if refused:
        with pytest.raises(ValueError, match=r"PYTHONPATH=\S+.*Write it in front"):
            run.refuse_skipped(words)
    else:
        run.refuse_skipped(words)


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="there is no command 'no-such-tool'"):
        run.replace_process(["no-such-tool"])


@pytest.mark.parametrize(("mode", "says"), [(0o644, "is a file, but no command"), (0o755, "without a first line")])
def test_a_script_that_nobody_can_start_is_named_with_the_fix(tmp_path: Path, mode: int, says: str) -> None:
    script = tmp_path / "train"
    script.write_text("echo\n")
    script.chmod(mode)
    line = [sys.executable, "-m", "alphaadam_dist", "run", "--", str(script)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert says in done.stderr
    assert f"as in `bash {script}`" in done.stderr


def test_the_command_gets_the_signals_that_python_ignores() -> None:
    """Else `yes | head -1` fails with "Broken pipe" under it, and `set -o pipefail` sees another code."""
    line = [sys.executable, "-m", "alphaadam_dist", "run", "--", "grep", "SigIgn", "/proc/self/status"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    mask = int(done.stdout.split()[1], 16)
    assert not mask & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)), done.stdout


@pytest.fixture
def mpi(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An mpirun that says whose it is."""
    name, said = request.param
    command = tmp_path / name
    command.write_text(f"#!/bin/sh\necho '{said}'\n")
    command.chmod(0o755)
    return str(command)


VARIABLES = {"ALPHAADAM_OPTIM": "alphaadam", "HOME": "/root"}


OPEN_MPI = "mpirun (Open MPI) 5.0.11"


@pytest.mark.parametrize("mpi", [("mpirun", OPEN_MPI), ("mpirun.openmpi", OPEN_MPI)], indirect=True)
def test_open_mpi_is_told_each_name(mpi: str) -> None:
    line = run.told([mpi, "-np", "2", "python", "train.py"], VARIABLES)
    assert line == [mpi, "-x", "PYTHONPATH", "-x", "ALPHAADAM_OPTIM", "-np", "2", "python", "train.py"]


@pytest.mark.parametrize("mpi", [("mpirun", "HYDRA build details:")], indirect=True)
def test_other_mpis_hand_on_everything(mpi: str) -> None:
    assert run.told([mpi, "-np", "2", "python"], VARIABLES) == [mpi, "-np", "2", "python"]


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("srun -n2 x --export=NONE", "srun -n2 x --export=NONE"),
        ("srun --export=NONE x", "srun --export=PYTHONPATH,ALPHAADAM_OPTIM x"),
        ("srun -n 2 --export=NONE x", "srun -n 2 --export=PYTHONPATH,ALPHAADAM_OPTIM x"),
        ("srun -u sh x --export=NONE", "srun -u sh x --export=NONE"),
        ("srun -- x --export=NONE", "srun -- x --export=NONE"),
        ("sbatch --nodes 2 --export=NONE x", "sbatch --nodes 2 --export=PYTHONPATH,ALPHAADAM_OPTIM x"),
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
