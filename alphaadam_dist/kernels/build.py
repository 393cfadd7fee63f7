"""Compiles cpu.cpp at first use and keeps the library in the cache, for every process of this machine.

The library is named after all that it depends on, so a new torch, another compiler or another kind of processor gets
one of its own. It is built in a folder beside it and moved into place whole; a process that is killed while it builds
leaves no lock behind.
"""

import contextlib
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

from ..paths import cache_dir
from ..torch_versions import compiler_flags

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
DIGEST = hashlib.sha256().digest_size
MACHINE_FLAGS = ["-march=native", "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []


class Unavailable(RuntimeError):
    """The kernels cannot be had here; the message says why and what to do."""


@functools.cache
def load() -> None:
    """Register the operators ``torch.ops.alphaadam``, compiling them where nobody has yet (some seconds).

    Raises:
        Unavailable: no compiler, a failed compilation, no cache folder to write to or one in which others could place a
            library, or a library that cannot be loaded.
    """
    path = library(MACHINE_FLAGS)
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"the compiled kernels cannot be loaded ({error.__cause__ or error}): set ALPHAADAM_CACHE to a folder from "
            "which programs may run, or to an empty one"
        ) from error


def library(machine_flags: list[str]) -> Path:
    """The compiled library. ``machine_flags`` say for which processor. Raises Unavailable, as ``load``."""
    try:
        folder = cache_dir() / "kernels"
    except OSError as error:
        raise Unavailable(str(error)) from error
    flags = FLAGS + machine_flags + compiler_flags()
    compiler = os.environ.get("CXX", "").strip() or "c++"
    try:
        parts = [path.read_bytes() for path in (SOURCE, *HEADERS)], torch.__version__, compiler, _processor(), flags
        found = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.so"
        folder.mkdir(mode=0o755, exist_ok=True)
        for holder in (folder.parent, folder):
            _refuse_open(holder)
        if not _whole(found):
            with open(folder / "lock", "w") as lock:
                with contextlib.suppress(OSError):  # not every file system has locks
                    fcntl.flock(lock, fcntl.LOCK_EX)  # one of this machine's ranks compiles, the others wait
                if not _whole(found):
                    _compile(compiler, flags, found)
        _refuse_open(found)
    except OSError as error:
        raise Unavailable(
            f"the compiled kernels cannot be kept in {folder} ({error}): set ALPHAADAM_CACHE to a folder of your own "
            "with space in it"
        ) from error
    return found


def _whole(library: Path) -> bool:
    """It is there as it was made: it ends in the digest of what stands before. A damaged one may crash its loader."""
    if not library.exists():
        return False
    held = library.read_bytes()
    return hashlib.sha256(held[:-DIGEST]).digest() == held[-DIGEST:]


def _compile(compiler: str, flags: list[str], into: Path) -> None:
    try:
        command = shlex.split(compiler)
    except ValueError as error:
        raise Unavailable(f"CXX={compiler!r} is no command ({error}): set it to a C++ compiler") from error
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler {compiler!r}: install g++, or set CXX to one that is there")
    torch_folder = Path(torch.__file__).parent
    headers, libraries = torch_folder / "include", torch_folder / "lib"
    places = [f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        made = Path(folder) / into.name
        line = [*command, *flags, "-fPIC", "-shared", str(SOURCE), "-o", str(made), *places, "-ltorch_cpu", "-lc10"]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise Unavailable(f"{shlex.join(line)} failed:\n{done.stderr[-2000:]}")
        with open(made, "ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.chmod(0o755)
        os.replace(made, into)


def _refuse_open(path: Path) -> None:
    """A library that others can change would run with this user's rights. root can do that anyway."""
    status = path.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(
            f"{path} in the cache folder belongs to another user or is writable by others: chmod go-w it, or set "
            "ALPHAADAM_CACHE to a folder of your own"
        )


def _processor() -> bytes:
    """What the processor can do: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
