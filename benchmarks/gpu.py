"""All that needs a GPU, in one command: the tests there, what a step costs, CUDA graphs, NCCL, a trace.

    make gpu                        about ten minutes on an H100
    make gpu ONLY="graphs nccl"     some parts

Needs torch (2.11 or later), Triton and pytest, no network and no other package; DeepSpeed is tried where it is there.
Each part is a process of its own, with ten minutes at most. What it found is written to
``benchmarks/results/DATE-gpu.json`` as soon as it ends, and parts that passed are not repeated on the same day by
the same code, so an interrupted run goes on. The exit status is 1 where a part failed or missed a bar, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SECONDS = 600

PARTS = {
    "tests": "the kernels' tests on this GPU",
    "bars": "a step of 1e9 parameters beside fused AdamW, and the share of the bandwidth of a copy",
    "bf16": "the same with parameters and state in bf16",
    "graphs": "CUDA graphs of every optimizer, with clip_norm and without: replays are eager steps, bit for bit",
    "nccl": "FSDP2 over NCCL with one rank: its steps are those of one process, bit for bit",
    "trace": "what a step launches, and whether it waits for the device",
    "deepspeed": "ZeRO-2 with one rank beside plain steps, where DeepSpeed is installed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All that needs a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; none: all")
    parser.add_argument("--again", action="store_true", help="also what has passed today")
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        print(
            f"There is no GPU that torch {torch.__version__} can use (torch.cuda.is_available() is False): nothing was "
            "run and nothing written. Run this on a machine with an NVIDIA GPU and a CUDA build of torch."
        )
        return 2
    path = RESULTS / f"{datetime.date.today().isoformat()}-gpu.json"
    return run(given.parts or list(PARTS), path, given.again)


def run(parts: Sequence[str], path: Path, again: bool = False) -> int:
    """Run parts, each in a process, and write what each found to ``path`` when it ends. 1 where one failed."""
    here = where()
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("where") != here:
        found = {"where": here, "parts": {}}
    for part in parts:
        if found["parts"].get(part, {}).get("passed") and not again:
            print(f"== {part}: has passed already")
            continue
        print(f"== {part}: {PARTS[part]}", flush=True)
        result = _run_part(part)
        found["parts"][part] = result
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"== {part}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']:.0f} s", flush=True)
    print(f"wrote {path}")
    return 0 if all(found["parts"][part]["passed"] for part in parts) else 1


def where() -> dict[str, str]:
    """Where the numbers come from, and of which code."""
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {"machine": name, "torch": torch.__version__, "triton": version, "python": sys.version.split()[0],
            "commit": commit}  # fmt: skip


def _run_part(part: str) -> dict[str, Any]:
    """Its lines as they come, then the JSON that its last line is."""
    start, last = time.monotonic(), ""
    line = [sys.executable, "-m", "benchmarks.gpu_parts", part]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        killer = _kill_after(process, SECONDS)
        assert process.stdout is not None
        for text in process.stdout:
            last = text.strip() or last
            print(f"   {text.rstrip()}", flush=True)
        killer.cancel()
    try:
        result = json.loads(last)
        assert isinstance(result, dict)
    except (ValueError, AssertionError):
        result = {"error": last}
    passed = process.returncode == 0 and bool(result.get("passed"))
    return {**result, "passed": passed, "status": process.returncode, "seconds": time.monotonic() - start}


def _kill_after(process: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
