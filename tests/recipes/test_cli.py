"""The command line as a person meets it."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

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
