"""The types that a user's program sees: strict mypy takes a right one, and finds the mistakes of a wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alphaadam_dist

RIGHT = """import torch
from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, parameter_groups

model = torch.nn.Linear(4, 4)
optimizer = AlphaAdam(
    model.named_parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, gamma=0.5, alpha_max=2.0,
    threshold=0.1, alpha_warmup=10, scope="layer", sync="exact", clip_norm=1.0, sharding="auto", process_group=None,
    fused=None, capturable=False, maximize=False, verify_every=10, lookahead=0.25,
)
AlphaLion([{"params": model.weight, "lr": 1e-4}], betas=(0.9, 0.99), maximize=True)
AlphaSGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, nesterov=True)
AlphaLion(parameter_groups(model, [{"match": "weight", "lr_scale": 4.0}, {"match": "bias", "lr": 0.1}], AlphaLion))


def closure() -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(2, 4)).square().sum()
    loss.backward()
    return float(loss)


optimizer.step(closure)
optimizer.step()
alpha: float | dict[str, float] = optimizer.alpha
conflict: float = optimizer.agreement["conflict"]
logged: dict[str, float | None] = optimizer.metrics()
optimizer.load_state_dict(optimizer.state_dict())
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
"""
WRONG = {
    "AlphaAdam(model.parameters(), gama=0.5)": 'Unexpected keyword argument "gama"',
    'AlphaAdam(model.parameters(), gamma="half")': 'Argument "gamma" to "AlphaAdam" has incompatible type "str"',
    "AlphaLion(model.parameters(), eps=1e-8)": 'Unexpected keyword argument "eps"',
    "parameter_groups(model, 4.0)": 'Argument 2 to "parameter_groups" has incompatible type "float"',
    "optimizer.alpha.upper()": 'has no attribute "upper"',
}


@pytest.mark.slow
def test_a_users_program(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(RIGHT + "\n".join(WRONG))
    # as in a project of its own, where the package is installed
    package = str(Path(alphaadam_dist.__path__[0]).parent)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", ".cache", "right.py", "wrong.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": package}, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert not [error for error in errors if error.startswith("right.py")], done.stdout
    first = len(RIGHT.splitlines()) + 1
    for i, (line, message) in enumerate(WRONG.items()):
        assert any(f"wrong.py:{first + i}: " in error and message in error for error in errors), (line, done.stdout)
    assert len(errors) == len(WRONG) + 1, done.stdout  # "upper" is missed twice: on float, and on dict
