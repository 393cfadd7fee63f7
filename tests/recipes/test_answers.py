"""The answers that are shown after fine-tuning: from a file that may have been changed."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from recipes.answers import FILE_NAME, print_answers

TOLD = {"questions": ["Why?"], "before": ["[red]"], "after": ["So."]}


def test_question_and_answers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / FILE_NAME).write_text(json.dumps(TOLD))
    print_answers(Console(), tmp_path)
    assert capsys.readouterr().out.split() == ["Why?", "before", "[red]", "after", "So."]


@pytest.mark.parametrize(
    "held",
    ["", "[]", "5", '{"questions": ["a"]}', json.dumps(TOLD | {"after": []}), json.dumps(TOLD | {"before": "no"})],
)
def test_a_file_of_another_shape_is_named(tmp_path: Path, held: str):
    (tmp_path / FILE_NAME).write_text(held)
    with pytest.raises(ValueError, match=f"{tmp_path / FILE_NAME} .*: restore it, or start afresh with another --out"):
        print_answers(Console(), tmp_path)
