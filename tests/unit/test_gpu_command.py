"""``make gpu`` without a GPU: what it says and writes, and that a bare machine has what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["bars", "grahps"])
    assert "no part 'grahps'" in capsys.readouterr().err


def test_results_are_written_as_they_come_and_a_second_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran, fails = tmp_path / "gpu.json", [], {"graphs"}

    def part(name: str) -> dict[str, Any]:
        if ran:
            assert ran[-1] in json.loads(path.read_text())["parts"]
        ran.append(name)
        return {"passed": name not in fails, "seconds": 1.0}

    monkeypatch.setattr(gpu, "_run_part", part)
    assert gpu.run(["bars", "graphs", "nccl"], path) == 1
    fails.clear()
    assert gpu.run(["bars", "graphs", "trace"], path) == 0
    assert ran == ["bars", "graphs", "nccl", "graphs", "trace"]
    assert gpu.run(["bars"], path, again=True) == 0
    assert ran[-1] == "bars"
    held = json.loads(path.read_text())
    assert set(held["parts"]) == {"bars", "graphs", "nccl", "trace"}
    path.write_text(json.dumps({**held, "where": {**held["where"], "commit": "another"}}))
    assert gpu.run(["nccl"], path) == 0
    assert set(json.loads(path.read_text())["parts"]) == {"nccl"}, "numbers of other code are not mixed in"


_BARE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import benchmarks.gpu, benchmarks.gpu_parts, alphaadam_dist.kernels.triton
for name in benchmarks.gpu.PARTS:
    assert callable(getattr(benchmarks.gpu_parts, name)), name
import pytest
collected = pytest.main(["-q", "-o", "addopts=", "--collect-only", *benchmarks.gpu_parts.TESTS])
assert collected == 0, collected
"""


@pytest.mark.slow
def test_a_bare_machine_has_all_that_it_imports() -> None:
    """torch, Triton, pytest and what these bring."""
    pytest.importorskip("triton", reason="Triton is not installed")
    absent = {
        "deepspeed", "hypothesis", "rich", "typer", "matplotlib", "transformers", "accelerate", "datasets", "peft",
        "expecttest", "pytest_timeout", "xdist", "_hypothesis_pytestplugin", "pandas", "mpi4py", "ninja",
    }  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    line = [sys.executable, "-c", _BARE.replace("{absent}", repr(absent))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_parts_that_know_no_cuda_run_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small, and their bars mean nothing there."""
    monkeypatch.setattr(gpu_parts, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_parts, "ELEMENTS", 5000)
    monkeypatch.setattr(gpu_parts, "ROUNDS", 2)
    bars, bf16 = gpu_parts.bars(), gpu_parts.bf16()
    assert [row["name"] for row in bars["rows"]] == ["AdamW fused", "delayed", "exact", "clip_norm"]
    assert [row["bar"] for row in bars["rows"]] == [None, 1.05, 1.35, 0.95]
    assert bars["rows"][3]["against"] == "clip_grad_norm_ + AdamW fused"
    assert [row["bar"] for row in bf16["rows"]] == [None, 0.75]
    sharded = gpu_parts._alone("gloo", gpu_parts._fsdp2_beside_plain)
    assert sharded["passed"], sharded
    assert len(sharded["same_bits"]) == 12
    json.dumps([bars, bf16, sharded])
    assert "MISSED" in capsys.readouterr().out or bars["passed"]
