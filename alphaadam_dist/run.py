"""`alphaadam run`: becomes a command under which every Python process knows AlphaAdam.

A folder with a sitecustomize in front of PYTHONPATH is all there is to it: Python runs it at its start, and children
inherit it. To ranks on other nodes it goes the launcher's way: torchrun and accelerate are started on each node;
`deepspeed` hands on PYTHONPATH itself, and our variables by ``zero/registration.py``; mpirun and srun are told here.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

STARTUP = str(Path(__file__).parent / "startup")

_PYTHON = re.compile(r"(python|pypy)[\d.]*$")
_WITH_VALUE = "XW"
_SKIPS = {"I": "ignores the environment", "E": "ignores PYTHONPATH", "S": "runs no sitecustomize"}
_SLURM = ("srun", "sbatch", "salloc")
_OWN_PATH = re.compile(r"(?:^|[\s,;=])PYTHONPATH=(?!\S*\$\{?PYTHONPATH)")
"""A PYTHONPATH that does not take over the one before it."""


def replace_process(command: list[str]) -> None:
    """Become the command, in its environment. Does not return.

    Raises:
        ValueError: there is no such command, or it tells Python to skip what makes AlphaAdam known.
    """
    name, in_front = command[0], f"write what runs it in front, as in `bash {command[0]}` or `python {command[0]}`"
    found = shutil.which(name)
    if found is None and Path(name).is_file():
        raise ValueError(f"{name} is a file, but no command: {in_front}")
    if found is None:
        raise ValueError(f"there is no command {name!r}: check its name, and that its environment is activated")
    refuse_skipped(command, shebang(found))
    variables = environment(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python at its start, and then by what it becomes
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execve(found, told(command, variables), variables)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        raise ValueError(f"{name} is a script without a first line (#!) that says what runs it: {in_front}") from None


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment with our folder in front of PYTHONPATH, and in what SLURM is told to hand on."""
    before = given.get("PYTHONPATH")
    others = [entry for entry in before.split(os.pathsep) if entry != STARTUP] if before else []  # "": this folder
    result = {**given, "PYTHONPATH": os.pathsep.join([STARTUP, *others])}
    for name in ("SLURM_EXPORT_ENV", "SBATCH_EXPORT", "SALLOC_EXPORT"):
        if name in result:
            result[name] = _exported(result[name], result)
    return result


def handed_on(variables: Mapping[str, str]) -> list[str]:
    """The names of what must reach every rank."""
    return ["PYTHONPATH", *sorted(name for name in variables if name.startswith("ALPHAADAM_"))]


def told(command: list[str], variables: Mapping[str, str]) -> list[str]:
    """The command, in which mpirun and SLURM are told what to hand on, where they would not do so by themselves."""
    first, *others = command
    name = Path(first).name.removesuffix(".openmpi")  # as Debian has it
    if name in ("mpirun", "mpiexec", "orterun") and _is_open_mpi(first):
        return [first, *(word for name in handed_on(variables) for word in ("-x", name)), *others]
    if name in _SLURM:
        for i, word in enumerate(others):
            if word == "--export" and others[i + 1 :]:
                others[i + 1] = _exported(others[i + 1], variables)
            elif word.startswith("--export="):
                others[i] = f"--export={_exported(word.removeprefix('--export='), variables)}"
            elif word == "--" or not (word.startswith("-") or (i and _takes_the_next(others[i - 1]))):
                break
    return [first, *others]


def _takes_the_next(word: str) -> bool:
    """An option that may have its value in the next word: SLURM has too many to know those that have none."""
    return word.startswith("-") and ("=" not in word if word.startswith("--") else len(word) == 2)


def _exported(given: str, variables: Mapping[str, str]) -> str:
    """SLURM's list of names to hand on, with ours: ALL is enough, and NONE stands alone."""
    names = [] if given in ("NONE", "NIL", "") else given.split(",")
    return given if "ALL" in names else ",".join([*names, *(n for n in handed_on(variables) if n not in names)])


def _is_open_mpi(command: str) -> bool:
    """Open MPI hands on what it is told to; the others (MPICH, Intel MPI) everything, and do not know -x."""
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in said.stdout or "OpenRTE" in said.stdout


def shebang(path: str) -> list[str]:
    """The words of a script's first line after #!; none for any other file."""
    with open(path, "rb") as file:
        line = file.readline(1024)
    return line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []


def refuse_skipped(*lines: Iterable[str]) -> None:
    """Raise ValueError where a command line or a shebang starts Python with -I, -E, -S or a PYTHONPATH of its own."""
    for line in lines:
        words = list(line)
        for i, word in enumerate(words):
            if _OWN_PATH.search(word):
                raise ValueError(
                    f"{word}: this PYTHONPATH would stand in place of the one by which Python knows AlphaAdam. Write "
                    "it in front, as in `PYTHONPATH=... alphaadam run -- COMMAND`, or write `import alphaadam_dist` "
                    "into the script"
                )
            if not _PYTHON.match(Path(word).name):
                continue
            for letter in _flags(words[i + 1 :]):
                if letter in _SKIPS:
                    raise ValueError(
                        f"{' '.join(words[i:])}: with -{letter} Python {_SKIPS[letter]}, so it would not know "
                        f"AlphaAdam. Leave out -{letter}, or write `import alphaadam_dist` into the script"
                    )


def _flags(words: list[str]) -> Iterable[str]:
    """The letters of Python's own options at the beginning of these words."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            return
        if word.startswith("--"):
            continue
        for i, letter in enumerate(word[1:], 2):
            yield letter
            if letter in "cm":
                return
            if letter in _WITH_VALUE:
                if word[i:] == "":
                    next(rest, None)
                break
