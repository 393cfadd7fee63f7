"""The picture has curves in it."""

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from alphaadam_dist.training import main_job
from alphaadam_dist.training.plots import plot_run
from benchmarks import step_time, turns
from tests.recipes.test_run_folder import SETTINGS


def _entries(shift: float, alpha: bool) -> list[dict[str, float]]:
    train = [
        {"step": s, "loss": 8 / s**0.2 + shift, **({"alpha": 2.0, "agreement": 0.5} if alpha else {})}
        for s in range(1, 99)
    ]
    return train + [{"step": s, "eval_loss": 8 / s**0.2 + shift} for s in range(10, 99, 10)]


def _pixels(path: Path, color: str) -> int:
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    image = matplotlib.image.imread(path)[:, :, :3]
    return int((np.abs(image - wanted).max(axis=2) < 0.02).sum())


def test_both_curves_are_drawn(tmp_path: Path):
    path = tmp_path / "losses.png"
    plot_run({"AlphaAdam": _entries(0, True), "AdamW": _entries(0.5, False)}, "a run", path)
    assert matplotlib.image.imread(path).shape[1] > 1200
    assert _pixels(path, "#d1495b") > 2000
    assert _pixels(path, "#30638e") > 1000


def test_one_optimizer_alone_can_be_drawn(tmp_path: Path):
    path = tmp_path / "losses.png"
    plot_run({"AlphaAdam": _entries(0, True)}, "a run", path)
    assert _pixels(path, "#d1495b") > 2000
    assert _pixels(path, "#30638e") == 0


def test_the_picture_of_the_main_job_names_rate_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles: list[str] = []
    monkeypatch.setattr(main_job, "plot_run", lambda logs, title, path: titles.append(title))
    monkeypatch.setattr(main_job, "print_losses", lambda *_: None)
    monkeypatch.setattr(main_job, "print_samples", lambda *_: None)
    main_job.report(Console(file=io.StringIO()), tmp_path, SETTINGS, ["alphaadam"])
    assert titles == ["tiny-llama on stdlib, ZeRO-2 on 2 ranks, lr 0.001, seed 0"]


def _step_times(slow: float, path: Path) -> tuple[int, int]:
    """Pixels of bars, ours and the peers'."""
    ratios = {turns.FUSED: 1.0, turns.CLIPPED: 1.5, step_time.DEFAULT: 1.4, "C-AdamW": slow}
    measured = [turns.Row("32 Mi", name, 1.0, turns.FUSED, ratio, (1.0, 1.0)) for name, ratio in ratios.items()]
    step_time.draw(measured, "a machine", path)
    return _pixels(path, step_time.OURS_COLOR), _pixels(path, step_time.PEERS_COLOR)


def test_slow_peers_do_not_shrink_the_picture_of_step_times(tmp_path: Path):
    """The axis is linear and ends where a choice ends; bars are as long as their ratio."""
    ours, peers = _step_times(18.0, tmp_path / "step.png")
    assert _step_times(59.0, tmp_path / "step.png") == (ours, peers)
    assert peers / ours == pytest.approx((1.0 + 1.5) / 1.4, rel=0.05)  # labels have the colours too
