"""The command line as a person meets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alphaadam_dist import __version__, cli
from alphaadam_dist.cli import app


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_names_every_option_and_shows_an_example():
    text = _run("--help").output
    options = "model data steps lr batch block seed compare zero fsdp offload gpus out resume"
    for option in options.split():
        assert f"--{option} " in text
    assert re.search(r"alphaadam train --model \S+ --data \S+", text)


def test_convert_shows_both_commands():
    result = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert "python -m deepspeed.checkpoint.ds_to_universal --input_folder" in result.output
    assert "alphaadam convert ck/universal ck/dcp" in result.output


LIGHT = """
import sys
from alphaadam_dist.cli import app
for arguments in (["--help"], ["train", "--help"], ["plan", "--help"], ["--version"]):
    app(arguments, standalone_mode=False)
print("imported:", {"torch", "numpy", "transformers", "matplotlib", "deepspeed"} & set(sys.modules))
"""


def test_help_and_version_import_nothing_heavy():
    """That is what makes them answer at once."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: set()\n"), done.stdout[-200:] + done.stderr


@pytest.mark.parametrize("lacking", ["typer", "rich", "json"])
def test_without_its_packages_it_says_what_it_needs(lacking: str):
    """And hides no other error."""
    program = f"import sys; sys.modules[{lacking!r}] = None; from alphaadam_dist.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert ("the command line needs pip install 'alphaadam-dist[cli]'" in done.stderr) == (lacking != "json")
    assert ("Traceback" in done.stderr) == (lacking == "json")


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"alphaadam-dist {__version__}\n")


@pytest.mark.parametrize(("more", "extras"), [([], "deepspeed,hf"), (["--fsdp"], "hf")])
def test_train_without_its_packages_says_what_it_needs(
    more: list[str], extras: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("datasets", "matplotlib") else sys)
    result = _run(*more)
    assert result.exit_code == 1
    said = f"not installed: datasets, matplotlib; training needs pip install 'alphaadam-dist[{extras}]'"
    assert said in result.output
    assert not any(tmp_path.iterdir())


def test_bench_outside_of_the_repository_says_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    result = CliRunner().invoke(app, ["bench"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 1
    assert "is not in the wheel: `git clone https://github.com/" in result.output
    assert "make bench" in result.output


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", "cpu:"])
def test_bench_names_a_device_that_is_not_there(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ["bench", "--device", device, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 1
    assert f"--device is {device}: give cpu, or cuda where" in result.output


@pytest.mark.slow
def test_a_start_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alphaadam_dist.training.start_ranks.shutil.which", lambda *_, **__: None)
    for out in ([], ["--out", "some/where"]):
        result = _run(*out)
        assert "the deepspeed launcher is not installed; training needs pip install" in result.output
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("made", [False, True])
def test_resuming_where_no_run_is_is_refused(made: bool, tmp_path: Path):
    out = tmp_path / "typo"
    if made:
        out.mkdir()
    result = _run("--resume", "--out", str(out))
    assert result.exit_code == 1
    assert f"--out {out} has no run to go on with: check the path, or leave out --resume" in result.output
    assert out.exists() == made


COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0
    _, _, examples = result.output.partition("Examples")
    assert f"alphaadam {command}" in examples


def test_a_mistyped_command_gets_a_suggestion():
    result = CliRunner().invoke(app, ["trian"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code != 0
    assert "Did you mean 'train'?" in result.output


def test_a_mistyped_option_gets_a_suggestion():
    result = _run("--stesp", "5")
    assert result.exit_code != 0
    assert "--stesp" in result.output
    assert "--steps" in result.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--zero", "5"], ["--zero", "5", "0, 1, 2 and 3"]),
        (["--steps", "0"], ["--steps", "0", "1 or more"]),
        (["--steps", "many"], ["--steps", "valid integer"]),
        (["--fsdp", "--zero", "3"], ["--fsdp", "--zero 3", "one of them"]),
        (["--fsdp", "--offload"], ["--offload", "FSDP2", "--zero 2"]),
        (["--offload", "--zero", "0"], ["--offload", "ZeRO-0", "--zero 2"]),
        (["--data", "./nowhere"], ["--data", "./nowhere", "no such file"]),
        (["--lr", "inf"], ["--lr is inf", "above 0 and finite"]),
        (["--steps", "1000000000000"], ["--steps", "1,000,000,000 or less"]),
        (["--gpus", "100000"], ["--gpus is 100000", "give --gpus"]),
        (["--seed", "-1"], ["--seed is -1", "from 0 to"]),
        (["--out", __file__], ["--out", "cannot be used"]),
        (["--out", f"{__file__}/run"], ["--out", "cannot be used", "a part of this path is a file"]),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(arguments: list[str], parts: list[str]):
    result = _run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    for part in parts:
        assert part in result.output.splitlines()[-1] or result.exit_code == 2  # 2: click's own box


def test_a_used_folder_is_refused(tmp_path: Path):
    (tmp_path / "something").touch()
    result = _run("--out", str(tmp_path))
    assert result.exit_code != 0
    assert f"{tmp_path} is not empty" in result.output
    assert "--resume" in result.output
