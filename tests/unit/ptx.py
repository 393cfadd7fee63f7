"""Compiles the GPU kernels for an H100 and prints as JSON what the compiler made of each. Needs no GPU.

A process of its own: the tests import Triton as an interpreter. Triton brings its own assembler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alphaadam_dist.kernels import triton as kernels

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}
POINTERS = {
    "work": "*i64", "table": "*i64", "scale": "*fp64", "threshold": "*fp64", "strengths": "*fp64", "numbers": "*fp64",
    "rounding": "*i64", "counts": "*i64", "squares": "*fp64", "tensors": "i32", "strengths_stride": "i32",
}  # fmt: skip


def jobs() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """A name, the kernel, and what it is compiled for: all that adds registers is on, but norms where not named."""
    for own, grads in (("fp32", "fp32"), ("fp32", "bf16"), ("fp64", "fp64")):
        common = {"G": TYPES[grads], "SCALE": True, "THRESHOLD": True, "BLOCK": kernels.BLOCK}
        yield f"count {own} {grads}", kernels._count, {
            **common, "T": TYPES[own], "M": TYPES[own], "NORMS": True,
        }  # fmt: skip
        for direction, kind in enumerate(("adam", "lion", "sgd")):
            update = {**common, "DIRECTION": direction, "NESTEROV": True, "COUNTING": True, "NORMS": False}
            yield f"{kind} {own} {grads}", kernels._update, {**update, "T": TYPES[own]}
            if own == "fp32":
                yield f"{kind} norms {grads}", kernels._update, {**update, "T": TYPES[own], "NORMS": True}
                yield f"{kind} rounded {grads}", kernels._update_rounded, {
                    **update, "P": TYPES[grads], "BLOCK": kernels.ROUNDED_BLOCK,
                }  # fmt: skip


def loops(ptx: str) -> list[str]:
    """The text of each innermost loop: from a label to the branch back to it."""
    lines = ptx.splitlines()
    labels = {label[1]: i for i, line in enumerate(lines) if (label := re.match(r"(\$\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if target and labels[target[1]] < i:
            spans.append((labels[target[1]], i))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b for c, d in spans if (c, d) != (a, b))]
    return ["\n".join(lines[a:b]) for a, b in inner]


def measured(ptx: str) -> dict[str, Any]:
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        line = [str(assembler), "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers is not None
    access = r"\b(?:ld|st)\.global[\w.:]*"
    return {
        "registers": int(registers[1]),
        "spilled": sum(map(int, spilled)),
        "loops": [re.findall(access, loop) for loop in loops(ptx)],
    }


def main() -> None:
    for name, kernel, constants in jobs():
        runtime = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        signature = {**{n: POINTERS[n] for n in runtime}, **dict.fromkeys(constants, "constexpr")}
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"enable_fp_fusion": False},
        )
        specialized = [parameter.name for parameter in kernel.params
                       if not parameter.is_constexpr and not parameter.do_not_specialize]  # fmt: skip
        print(json.dumps({"name": name, "specialized": specialized, **measured(made.asm["ptx"])}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
