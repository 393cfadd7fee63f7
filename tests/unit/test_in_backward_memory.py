"""The peak of a training step with the step in backward: gradients of one module beside parameters and moments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WIDTH, LAYERS = 2048, 24  # 100.7 million parameters

_TRAINING = """
import sys
from pathlib import Path
import torch
from torch import nn
from alphaadam_dist import AlphaAdam

def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

def trained(width, layers):
    dtype = getattr(torch, sys.argv[1])
    model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)])
    state = "bfloat16" if sys.argv[1] == "bfloat16" else None
    optimizer = AlphaAdam(model.named_parameters(), sync="delayed", state_dtype=state, fused=True)
    if sys.argv[2] == "in backward":
        optimizer.step_in_backward(model)
    for _ in range(2):
        model(torch.ones(4, width, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

trained(64, 2)  # compiles the kernels, and starts the threads
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
trained(int(sys.argv[3]), int(sys.argv[4]))
print("PEAK", resident("VmHWM") - before)
"""


def peak(dtype: str, how: str) -> float:
    """Bytes a parameter."""
    line = [sys.executable, "-c", _TRAINING, dtype, how, str(WIDTH), str(LAYERS)]
    # else glibc keeps blocks of up to 32 MiB that were freed, and the peak is that of its holes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("PEAK")[1]) / (LAYERS * WIDTH**2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "size", "kept"), [("bfloat16", 2, 4), ("float32", 4, 8)])
def test_the_peak_of_training(dtype: str, size: int, kept: int) -> None:
    """A module's gradient is a 24th of the parameters here; two of them are the bar, for what else a step needs."""
    after, within = peak(dtype, "after backward"), peak(dtype, "in backward")
    assert after == pytest.approx(2 * size + kept, rel=0.03)
    assert within <= size + kept + 2.5 * size / LAYERS + 0.1
    assert after - within >= 0.85 * size
