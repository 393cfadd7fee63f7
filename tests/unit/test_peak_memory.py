"""The peak of a step, from the operating system: 8 bytes a parameter where all is bf16, 16 where all is fp32."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ELEMENTS = 48 * 2**20

_STEP = """
import sys
from pathlib import Path
import torch
from alphaadam_dist import AlphaAdam

def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

def stepped(elements):
    dtype = getattr(torch, sys.argv[1])
    state = "bfloat16" if sys.argv[1] == "bfloat16" else None
    params = [torch.nn.Parameter(torch.ones(elements // 4, dtype=dtype)) for _ in range(4)]
    optimizer = AlphaAdam([(str(i), p) for i, p in enumerate(params)], state_dtype=state, sync=sys.argv[2], fused=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()

stepped(4096)  # compiles the kernels, and starts the threads
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
stepped(int(sys.argv[3]))
print("PEAK", resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("sync", ["exact", "delayed"])
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 8.0), ("float32", 16.0)])
def test_the_peak_of_a_step(dtype: str, expected: float, sync: str) -> None:
    line = [sys.executable, "-c", _STEP, dtype, sync, str(ELEMENTS)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split("PEAK")[1]) / ELEMENTS
    assert peak == pytest.approx(expected, rel=0.02)


_OPTIONS = """
import json, sys
from pathlib import Path
import torch
from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD

def resident(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1e3

def above(kind, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.ones(4 * 2**20, dtype=dtype)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = kind([(str(i), param) for i, param in enumerate(params)], fused=True, **options)
    optimizer.step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    optimizer.step()
    return resident("VmHWM") - before

counted = [{}, {"clip_norm": 0.1}, {"threshold": 0.1}, {"clip_norm": 0.1, "threshold": 0.1}]
sets = [{"scope": scope, **each} for scope in ("global", "layer") for each in counted]
sets += [{"sync": "delayed"}, {"sync": "delayed", "threshold": 0.1}, {"maximize": True}, {"verify_every": 1}]
found = {"AdamW": above(torch.optim.AdamW)}
for options in sets:
    for kind in (AlphaAdam, AlphaLion, AlphaSGD):
        found[f"{kind.__name__} {options}"] = above(kind, **options)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"bf16 state, {dtype} {options}"] = above(AlphaAdam, dtype, state_dtype="bfloat16", **options)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_option_makes_a_copy() -> None:
    """A step takes no more memory beyond what lies there than fused AdamW's, and 1 MB; a gradient has 16.8 MB."""
    done = subprocess.run([sys.executable, "-c", _OPTIONS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    above = {name: megabytes - found["AdamW"] for name, megabytes in found.items()}
    assert {name: round(megabytes, 2) for name, megabytes in above.items() if megabytes > 1} == {}
