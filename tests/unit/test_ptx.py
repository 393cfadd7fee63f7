"""What the compiler makes of the GPU kernels for an H100: found by reading PTX, for which no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("alphaadam_dist.kernels.triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

REGISTERS = {"count": 64, "adam": 64, "lion": 48, "sgd": 48}
"""For 8, 8, 10 and 10 programs of 128 threads on a multiprocessor, which has 65536. A thread of Adam has 64 bytes of
loads under way, so 8 programs have 64 KiB: three times what 3.35 TB/s need at a delay of 0.8 microseconds."""
ROUNDED, DOUBLE = 84, 104
NORMS = 96  # sums in float64; for 5 programs, 40 KiB of loads under way


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    root = Path(__file__).parents[2]
    line = [sys.executable, "-m", "tests.unit.ptx"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {kernel.pop("name"): kernel for kernel in map(json.loads, done.stdout.splitlines())}
    assert len(made) == 24
    return made


def test_a_thread_reads_and_writes_16_bytes_at_once(compiled: dict[str, Any]) -> None:
    """In the loop over full blocks: each tensor in one vector. The other loop is masked."""
    vector = {"fp32": ("ld.global.v4.b32", "st.global.v4.b32"), "fp64": ("ld.global.v2.b64", "st.global.v2.b64")}
    written = {"count": 0, "adam": 3, "lion": 2, "sgd": 2}
    for name, made in compiled.items():
        kind, own, grads = name.split()
        if own in ("rounded", "norms"):
            continue
        assert len(made["loops"]) == 2, name
        loads, stores = vector[own]
        each = 1 if own == "fp32" else 2  # vectors of a thread's four elements
        whole = made["loops"][0]
        assert whole.count(stores) == each * written[kind], name
        read = 2 if kind == "count" else 1 + written[kind]
        assert whole.count(loads) == each * (read - (grads == "bf16")), name
        assert set(whole) <= {loads, stores, *(["ld.global.v2.b32"] if grads == "bf16" else [])}, name


def test_a_loop_reads_nothing_but_its_tensors(compiled: dict[str, Any]) -> None:
    """No address and no number in float64: 8 bytes where the state has 4 or 2."""
    for name, made in compiled.items():
        if "fp64" not in name:
            assert made["loops"]
            assert not any("b64" in access for loop in made["loops"] for access in loop), name


def test_registers_leave_room_for_as_many_threads_as_the_memory_needs(compiled: dict[str, Any]) -> None:
    for name, made in compiled.items():
        kind, own, _ = name.split()
        most = {"rounded": ROUNDED, "norms": NORMS, "fp64": DOUBLE}.get(own) or REGISTERS[kind]
        assert made["registers"] <= most, name
        assert made["spilled"] <= 32, name  # Triton 3.6's assembler: some numbers, before the loops


def test_no_number_and_no_address_of_a_step_compiles_anything(compiled: dict[str, Any]) -> None:
    """One rank would stand still in mid-run: another number of tensors, or a scale that lies elsewhere."""
    for name, made in compiled.items():
        assert made["specialized"] == [], name
