"""`python -m benchmarks.rounding_cost`: what stochastic rounding costs by itself, which bounds a step on bf16 state.

A program of kernels/rounding.h alone, compiled as the kernels are, rounds blocks that lie in cache: no memory, no
update. Beside it one step of fused AdamW in fp32 on as many elements, and ours in fp32 and in bf16. CPU time of one
thread, best of several rounds in turns, so that a busy machine disturbs little.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import typer

from alphaadam_dist import AlphaAdam
from alphaadam_dist.kernels import build

from .turns import machine

ELEMENTS = 32 * 2**20
ROUNDS = 6
TENSORS = 3  # that are rounded for an element: the parameter and two moments

PROGRAM = """
#include "rounding.h"
#include <cstdio>
#include <cstdlib>
#include <ctime>
double now() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
int main(int, char** given) {
  const int64_t blocks = atoll(given[1]) / rounding::kBlock;
  alignas(64) uint32_t bits[128] = {}; alignas(64) float values[128]; uint16_t rounded[128];
  for (float& value : values) value = 1.2345f;
  const auto touch = [&] { asm volatile("" ::"r"(bits), "r"(values), "r"(rounded) : "memory"); };
  const double start = now();
  for (int64_t i = 0; i < blocks; ++i) { rounding::random_bits({12345, 7, 1}, i, bits); touch(); }
  const double middle = now();
  for (int64_t i = 0; i < blocks; ++i) { rounding::round_block(values, bits, rounded); touch(); }
  printf("%f %f\\n", middle - start, now() - middle);
}
"""


def optimizers() -> dict[str, torch.optim.Optimizer]:
    """Each with a parameter of its own that has a gradient."""

    def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.randn(ELEMENTS).to(dtype))
        made.grad = torch.randn(ELEMENTS).to(dtype)
        return made

    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "fused AdamW, fp32": torch.optim.AdamW([parameter(fp32)], fused=True),
        "AlphaAdam delayed, fp32": AlphaAdam([parameter(fp32)], fused=True, sync="delayed"),
        "AlphaAdam delayed, bf16": AlphaAdam([parameter(bf16)], fused=True, sync="delayed", state_dtype="bfloat16"),
    }


def main() -> None:
    """Print nanoseconds an element."""
    torch.set_num_threads(1)
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, seconds), seconds)

    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "cost.cpp"), Path(folder, "cost")
        source.write_text(PROGRAM)
        flags = [*build.FLAGS, *build.MACHINE_FLAGS, f"-I{build.SOURCE.parent}"]
        subprocess.run(["c++", *flags, str(source), "-o", str(program)], check=True)
        contestants = optimizers()
        for _ in range(ROUNDS):
            alone = subprocess.run([program, str(TENSORS * ELEMENTS)], capture_output=True, text=True, check=True)
            bits, rounding = map(float, alone.stdout.split())
            note("random bits alone", bits)
            note("rounding alone", rounding)
            for name, optimizer in contestants.items():
                start = time.thread_time()
                optimizer.step()
                note(name, time.thread_time() - start)
    nanoseconds = {name: round(1e9 * seconds / ELEMENTS, 2) for name, seconds in best.items()}
    print(json.dumps(machine(torch.device("cpu")) | nanoseconds, indent=2))


if __name__ == "__main__":
    typer.run(main)
