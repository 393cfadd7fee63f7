"""Compiles cpu.cpp at first use and keeps the library in the cache, for every process of this machine.

The library is named after all that it depends on, so a new torch, another compiler or another kind of processor gets
one of its own. It is built in a folder beside it and moved into place whole; a process that is killed while it builds
leaves no lock behind.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from ..cache import cache_dir

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
MACHINE_FLAGS = ["-march=native", "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


class Unavailable(RuntimeError):
    """The kernels cannot be compiled here; the message says why and what to do."""


@functools.cache
def load() -> None:
    """Register the operators ``torch.ops.alphaadam``, compiling them where nobody has yet (some seconds).

    Raises:
        Unavailable: no compiler, a failed compilation, or a cache folder in which others could place a library.
    """
    torch.ops.load_library(library(MACHINE_FLAGS))


def library(machine_flags: list[str]) -> Path:
    """The compiled library. ``machine_flags`` say for which processor. Raises Unavailable, as ``load``."""
    folder = cache_dir() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    for checked in (folder, folder.parent):
        _refuse_open_folder(checked)
    flags = FLAGS + machine_flags
    compiler = os.environ.get("CXX") or "c++"
    parts = SOURCE.read_bytes(), torch.__version__, compiler, _processor(), flags
    found = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.so"
    if not found.exists():
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of this machine's ranks compiles, the others wait
            if not found.exists():
                _compile(compiler, flags, found)
    return found


def _compile(compiler: str, flags: list[str], into: Path) -> None:
    from torch.utils import cpp_extension

    if shutil.which(shlex.split(compiler)[0]) is None:
        raise Unavailable(f"there is no C++ compiler {compiler!r}: install g++, or set CXX to one that is there")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        made = Path(folder) / into.name
        line = [*shlex.split(compiler), *flags, "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(made), *libraries]
        done = subprocess.run([*line, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"{shlex.join(line)} failed:\n{done.stderr[-2000:]}")
        os.replace(made, into)


def _refuse_open_folder(folder: Path) -> None:
    """A library that others can put here would run with this user's rights."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(
            f"the cache folder {folder} belongs to another user or is writable by others: chmod go-w it, or set "
            "ALPHAADAM_CACHE to a folder of your own"
        )


def _processor() -> bytes:
    """What the processor can do: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
