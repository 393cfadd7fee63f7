"""The picture has curves in it."""

from pathlib import Path

import matplotlib.image
import numpy as np

from alphaadam_dist.training.plots import plot_run


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
