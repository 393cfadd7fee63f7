"""What differs between the versions of torch that are served."""

import functools
import re
import warnings

import torch
import torch.distributed as dist

TESTED = ("2.6", "2.15")
"""The oldest and the newest torch that the tests run with."""


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare: (2, 13, 0) of "2.13.0+cpu", () of a text that is none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


# 2.13 gave it this name, and warns of the old one
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def compiler_flags() -> list[str]:
    """What a C++ library needs to link with this torch: its wheels had the old ABI of strings until 2.6."""
    return [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


@functools.cache
def warn_untested() -> None:
    """Warn, once, of a torch older or newer than the tested ones."""
    oldest, newest = TESTED
    if not numbers(oldest) <= numbers(torch.__version__)[:2] <= numbers(newest):
        warnings.warn(
            f"alphaadam_dist was tested with torch {oldest} to {newest}, and this is {torch.__version__}: it will be "
            "used all the same; `alphaadam verify` compares every sharding with one process",
            stacklevel=2,
        )
