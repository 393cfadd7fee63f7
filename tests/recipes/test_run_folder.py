"""Settings and run folders: mistakes are named, and no run is overwritten or mixed with another."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from alphaadam_dist.training.run_folder import open_optimizer_folder, open_run
from alphaadam_dist.training.settings import FILE_NAME, Settings

SETTINGS = Settings(
    model="tiny-llama",
    data="stdlib",
    zero=2,
    fsdp=False,
    offload=False,
    steps=10,
    gpus=2,
    lr=1e-3,
    batch=8,
    block=64,
    seed=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero": 4}, "--zero is 4: .* 0, 1, 2 and 3"),
        ({"zero": 1, "offload": True}, "--offload with ZeRO-1: .* --zero 2 or --zero 3"),
        ({"fsdp": True}, "--fsdp with --zero 2: .* one of them"),
        ({"zero": None, "fsdp": True, "offload": True}, "--offload with FSDP2: .* --zero 2 or --zero 3"),
        ({"steps": 0}, "--steps is 0: it must be 1 or more"),
        ({"gpus": -1}, "--gpus is -1: it must be 1 or more"),
        ({"batch": 0}, "--batch is 0: it must be 1 or more"),
        ({"block": 1}, "--block is 1: .* 2 tokens or more"),
        ({"lr": -1.0}, "--lr is -1.0: it must be above 0"),
        ({"lr": float("nan")}, "--lr is nan: it must be above 0"),
        ({"lr": float("inf")}, "--lr is inf: it must be above 0 and finite"),
        ({"steps": 10**12}, "--steps is 1000000000000: it must be 1,000,000,000 or less"),
        ({"batch": 10**9}, "--batch is 1000000000: it must be 10,000,000 or less"),
        ({"block": 10**9}, "--block is 1000000000: it must be 10,000,000 or less"),
        ({"gpus": 10**9}, "--gpus is 1000000000: it must be 10,000,000 or less"),
        ({"seed": -1}, "--seed is -1: it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed is 4294967296: it must be from 0 to 4294967295"),
        ({"model": "./nowhere"}, "--model is ./nowhere: there is no such file or folder"),
        (
            {"groups": "nowhere.json"},
            r"--groups is nowhere\.json: there is no such file; write a list there, as in \[\{",
        ),
        ({"data": "nowhere/"}, "--data is nowhere/: there is no such file or folder"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_settings_survive_the_file(tmp_path: Path):
    SETTINGS.save(tmp_path)
    assert asdict(Settings.load(tmp_path)) == asdict(SETTINGS)


def test_runs_are_numbered_and_resume_takes_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for number in range(1, 12):
        with open_run(None, False, SETTINGS) as run:
            assert run == Path(f"runs/train-{number}")
    with open_run(None, True, SETTINGS) as run:
        assert run == Path("runs/train-11")


def test_resume_without_any_run_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with open_run(None, True, SETTINGS) as run:
        assert Settings.load(run) == SETTINGS


def test_a_used_folder_is_refused_without_resume(tmp_path: Path):
    with open_run(tmp_path / "run", False, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match=r"run is not empty: add --resume .* or choose another --out"),
        open_run(tmp_path / "run", False, SETTINGS),
    ):
        pass


def test_resume_with_other_settings_is_refused(tmp_path: Path):
    with open_run(tmp_path, False, SETTINGS):
        pass
    with (
        pytest.raises(ValueError, match=r"--lr is 0.002, but the run in .* was started with 0.001"),
        open_run(tmp_path, True, replace(SETTINGS, lr=2e-3)),
    ):
        pass
    assert Settings.load(tmp_path) == SETTINGS


SAVED = json.dumps(asdict(SETTINGS))
WRONG_SETTINGS = {
    "cut short": (SAVED[:-9], "is cut short or no JSON"),
    "empty": ("", "is cut short or no JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "is cut short or no JSON"),
    "nested without end": ("[" * 10**5, "is cut short or no JSON"),
    "a list": ("[1, 2]", "holds a JSON list where an object belongs"),
    "null": ("null", "holds a JSON NoneType where an object belongs"),
    "of an older version": (
        SAVED.replace('"seed": 0', '"sharding": 2'),
        "is of another version .* it lacks seed and has",
    ),
    "of another kind": (SAVED.replace('"steps": 10', '"steps": "ten"'), "has steps='ten', which is of another kind"),
    "true for a number": (SAVED.replace('"steps": 10', '"steps": true'), "has steps=True, which is of another kind"),
    "a wrong value": (SAVED.replace('"steps": 10', '"steps": -1'), "--steps is -1"),
    "inputs of another shape": (SAVED[:-1] + ', "inputs": 5}', "has inputs=5 where an object belongs"),
}


@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_a_settings_file_that_is_not_ours_is_named_with_what_to_do(tmp_path: Path, wrong: str):
    held, message = WRONG_SETTINGS[wrong]
    path = tmp_path / FILE_NAME
    path.write_bytes(held if isinstance(held, bytes) else held.encode())
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error, open_run(tmp_path, True, SETTINGS):
        pass
    if wrong != "a wrong value":
        assert str(path) in str(error.value)
        assert "start afresh with another --out" in str(error.value)
    assert path.read_bytes() == whole


def test_settings_of_the_version_before_are_gone_on_with(tmp_path: Path):
    (tmp_path / FILE_NAME).write_text(SAVED)
    with open_run(tmp_path, True, SETTINGS) as run:
        assert Settings.load(run) == SETTINGS


def edit(folder: Path) -> None:
    (folder / "a.txt").write_text("other words")


def add(folder: Path) -> None:
    (folder / "c.txt").write_text("more words")


def remove(folder: Path) -> None:
    (folder / "b.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "b.txt").rename(folder / "d.txt")  # a document's name says whether it is held out


@pytest.mark.parametrize("change", [edit, add, remove, rename])
def test_data_that_changed_since_the_run_was_started_is_refused(tmp_path: Path, change: Callable[[Path], None]):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some words")
    (text / "b.txt").write_text("and some others")
    (text / "cached.pyc").write_bytes(b"\0\1")
    settings = replace(SETTINGS, data=str(text))
    with open_run(tmp_path / "run", False, settings):
        pass
    (text / "cached.pyc").write_bytes(b"\0\2")  # not text: nothing is trained on it
    (text / ".hidden").write_text("not read either")
    (text / "a.txt").write_text("some words")  # a later time of writing is no change
    with open_run(tmp_path / "run", True, settings):
        pass
    change(text)
    with (
        pytest.raises(ValueError, match=rf"--data {text} has changed since the run in {tmp_path / 'run'} was started"),
        open_run(tmp_path / "run", True, settings),
    ):
        pass


def test_a_changed_file_of_data_or_model_is_refused(tmp_path: Path):
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    settings = replace(SETTINGS, data=str(tmp_path / "text.txt"), model=str(tmp_path / "model"))
    with open_run(tmp_path / "run", False, settings):
        pass
    for path, option in ((tmp_path / "model" / "config.json", "model"), (tmp_path / "text.txt", "data")):
        held = path.read_text()
        path.write_text(f"{held} ")
        with pytest.raises(ValueError, match=f"--{option} .* has changed"), open_run(tmp_path / "run", True, settings):
            pass
        path.write_text(held)
    with open_run(tmp_path / "run", True, settings):
        pass


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("resume", [False, True])
def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path, resume: bool):
    (tmp_path / "file").write_text("mine")
    for out, why in (
        ("file", "(file exists|not a directory)"),
        ("file/run", "not a directory"),
        ("n" * 300, "file name too long"),
        ("/sys/alphaadam", "(operation not permitted|permission denied|read-only file system)"),
    ):
        for start in (
            open_run(tmp_path / out, resume, SETTINGS),
            open_optimizer_folder(tmp_path / out, "adamw", resume, SETTINGS),
        ):
            said = "has no run to go on with" if resume and out != "n" * 300 else rf"cannot be used, \S+: {why}: \w+"
            with pytest.raises(ValueError, match=rf"^--out {tmp_path / out} {said}"), start:
                pass
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_folder_of_somebody_elses_is_not_taken_for_a_run(tmp_path: Path):
    mine = {"settings.json": '{"theme": "dark"}', "losses.png": "a picture", "adamw/notes.txt": "notes"}
    for name, held in mine.items():
        folder = tmp_path / name.partition(".")[0].replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(held)
        before = tree(folder)
        for start in (open_run(folder, True, SETTINGS), open_optimizer_folder(folder, "adamw", True, SETTINGS)):
            with pytest.raises(ValueError, match=r"start afresh with another --out|choose another --out"), start:
                pass
        assert tree(folder) == before


def start_of_a_run(out: Path) -> Any:
    return open_run(out, False, SETTINGS)


def start_of_a_recipe(out: Path) -> Any:
    return open_optimizer_folder(out, "alphaadam", False, SETTINGS)


def fail(out: Path, error: type[BaseException], **files: str) -> None:
    """As a training does that has written these files."""
    assert (out / FILE_NAME).exists()
    (out / "alphaadam").mkdir(exist_ok=True)
    for name, held in files.items():
        (out / "alphaadam" / name).write_text(held)
    raise error


@pytest.mark.parametrize("start", [start_of_a_run, start_of_a_recipe])
@pytest.mark.parametrize("made", [False, True])
def test_a_start_that_fails_leaves_what_was_there(tmp_path: Path, start: Callable[[Path], Any], made: bool):
    (tmp_path / "mine").mkdir()
    out = tmp_path / "mine" / "run" / "of" / "today"
    if made:
        out.mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), start(out):
        fail(out, KeyboardInterrupt, **{"metrics.jsonl": ""})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("start", [start_of_a_run, start_of_a_recipe])
def test_a_log_and_results_stay(tmp_path: Path, start: Callable[[Path], Any]):
    out = tmp_path / "run"
    with pytest.raises(ImportError), start(out):
        fail(out, ImportError, **{"train.log": "why"})
    assert (out / "alphaadam" / "train.log").read_text() == "why"
    assert (out / FILE_NAME).exists()
    before = tree(out)
    with pytest.raises(ImportError), open_run(out, True, SETTINGS):
        raise ImportError
    assert tree(out).items() >= before.items()


def test_a_half_after_one_that_failed_at_once_may_have_other_settings(tmp_path: Path):
    with open_optimizer_folder(tmp_path, "alphaadam", False, SETTINGS):
        pass
    with open_optimizer_folder(tmp_path, "alphaadam", False, replace(SETTINGS, lr=2e-3)) as folder:
        assert Settings.load(tmp_path).lr == 2e-3
        (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"--lr is 0.003, .* started with 0.002"):  # noqa: SIM117
        with open_optimizer_folder(tmp_path, "adamw", False, replace(SETTINGS, lr=3e-3)):
            pass


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path):
    with (
        open_run(tmp_path, False, SETTINGS),
        pytest.raises(ValueError, match="still running in"),
        open_run(tmp_path, True, SETTINGS),
    ):
        pass


FSDP = replace(SETTINGS, zero=None, fsdp=True)


@pytest.mark.parametrize(("ranks", "share"), [(2, (8, 1)), (1, (8, 2)), (4, (4, 1)), (8, (2, 1)), (16, (1, 1))])
def test_any_number_of_ranks_takes_the_batch_that_the_run_was_started_with(ranks: int, share: tuple[int, int]):
    blocks, times = SETTINGS.share(ranks)
    assert (blocks, times) == share
    assert ranks * blocks * times == SETTINGS.gpus * SETTINGS.batch


def test_no_rank_takes_more_blocks_at_a_time_than_before():
    assert replace(SETTINGS, gpus=3, batch=5).share(1) == (5, 3)
    assert replace(SETTINGS, gpus=3, batch=4).share(2) == (3, 2)


def test_fsdp_resumes_on_another_number_of_ranks_and_remembers_the_first(tmp_path: Path):
    for gpus in (2, 1, 4):
        with open_run(tmp_path, gpus != 2, replace(FSDP, gpus=gpus)):
            pass
    assert Settings.load(tmp_path) == FSDP


@pytest.mark.parametrize(
    ("started", "gpus", "message"),
    [
        (FSDP, 3, "--gpus is 3, but a step of this run takes 16 blocks, .* give a divisor of 16"),
        (SETTINGS, 1, "--gpus is 1, but the run in .* was started with 2, and a ZeRO checkpoint .* give --gpus 2"),
    ],
)
def test_ranks_that_cannot_go_on_are_refused(started: Settings, gpus: int, message: str, tmp_path: Path):
    with open_run(tmp_path, False, started):
        pass
    with pytest.raises(ValueError, match=message), open_run(tmp_path, True, replace(started, gpus=gpus)):
        pass
