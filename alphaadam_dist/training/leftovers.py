"""What killed runs leave behind under DeepSpeed, found at the next start.

A lock: torch compiles DeepSpeed's operators at their first use and lays a file ``lock`` beside them meanwhile. Where
the process was killed it stays, and everybody who needs the operator waits for ever without a word. And buffers:
DeepSpeed's all-reduce on CPUs has 66 MiB of shared memory a rank in /dev/shm, of which nobody disposes.

Both are removed only where they are this user's and no process can have them open. Needs /proc, so Linux; without it
nothing is done. Imports neither DeepSpeed nor torch's compiler.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
BUFFER = "deepspeed_allreduce_buffer"
OPERATORS = (
    "async_io", "cpu_adagrad", "cpu_adam", "cpu_lion", "deepspeed_ccl_comm", "deepspeed_shm_comm", "fp_quantizer",
    "fused_adam", "fused_lamb", "fused_lion", "gds", "pin_memory", "quantizer", "random_ltd", "transformer", "utils",
)  # fmt: skip
"""Folders of those of DeepSpeed's operators that training may need, in torch's folder for extensions."""

OF_ONE_CONTAINER = ("overlay", "tmpfs")
OF_ONE_MACHINE = (*OF_ONE_CONTAINER, "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
"""Types of file systems that no process outside of it can write to."""

_OF_THE_MACHINE = {"pid": 0xEFFFFFFC, "ipc": 0xEFFFFFFF}  # inodes of its own namespaces, the same on every Linux
_PATIENCE = 60.0  # seconds for compilers whose run was killed to end


def clear(say: Callable[[str], None]) -> None:
    """Remove what no process can use any more, and say what stands in the way and cannot be removed.

    Args:
        say: called with each line that the user should read.
    """
    if not Path("/proc/self/fd").is_dir():
        return
    _clear_buffers()
    for lock in locks():
        _clear_lock(lock, say)


def free_shared_memory() -> None:
    """Remove this rank's buffer. For the end of a rank: the others have opened it when they initialized."""
    place = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    (SHARED_MEMORY / "_".join(map(str, (BUFFER, os.getuid(), *place)))).unlink(missing_ok=True)


def _clear_buffers() -> None:
    left = [path for path in SHARED_MEMORY.glob(f"{BUFFER}_{os.getuid()}_*") if _is_ours(path)]
    # a container may have the machine's shared memory and not see the machine's processes
    if not left or (_in_container("pid") and not _in_container("ipc")):
        return
    used = _used()
    for path in left:
        if str(path) not in used:
            _remove_unused(path)


def _in_container(kind: str) -> bool:
    """This process has a namespace of its own of that kind, or it cannot be told."""
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino != _OF_THE_MACHINE[kind]
    except OSError:
        return True


def locks() -> Iterator[Path]:
    """Locks that are there now in the folders where torch compiles DeepSpeed's operators."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        roots = [Path(given)]
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        roots = list(Path(cache, "torch_extensions").glob("py*"))
    for root in roots:
        yield from (path for name in OPERATORS if (path := root / name / "lock").exists())


def _clear_lock(lock: Path, say: Callable[[str], None]) -> None:
    lock = lock.resolve()
    end = time.monotonic() + _PATIENCE
    while True:
        used = _used()
        if str(lock) in used:
            say(f"A process on this machine compiles {lock.parent.name} for DeepSpeed: this run waits for it.")
            return
        if str(lock.parent) not in used:
            break
        if time.monotonic() > end:
            say(f"Compilers of a run that was killed still work in {lock.parent}: when they have ended, remove {lock}")
            return
        time.sleep(0.5)
    if not _is_ours(lock) or _file_system(lock) not in (OF_ONE_CONTAINER if _in_container("pid") else OF_ONE_MACHINE):
        say(
            f"{lock} makes DeepSpeed wait for a compilation, and no process of yours compiles here. If none of another "
            "user, container or machine does, remove that file: until then this run waits."
        )
    elif _remove_unused(lock):
        say(f"Removed {lock}, left by a run that was killed while it compiled.")


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody seemed to use, unless somebody has opened it since. Returns whether it is gone by this.

    It gets another name first: who opens it from then on makes a new one, and who was faster is seen.
    """
    aside = path.with_name(f"{path.name}.unused-{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another rank was faster
        return False
    if str(aside) in _used():
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(aside)
        aside.unlink()
        return False
    aside.unlink()
    return True


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _file_system(path: Path) -> str:
    """Its type, by the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(point.replace("\\040", " "), kind) for _, point, kind, *_ in mounts]
    return max((m for m in above if path.is_relative_to(m[0])), key=lambda m: len(m[0]), default=("", ""))[1]


def _used() -> set[str]:
    """Files that processes of this user have open or mapped, and the folders that they work in."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue
            for link in (process / "cwd", *(process / "fd").iterdir()):
                used.add(_target(link))
            for line in (process / "maps").read_text(errors="replace").splitlines():
                if BUFFER in line:
                    used.add(line.split(maxsplit=5)[-1])
        except OSError:  # it has ended
            continue
    return used


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
