"""Compiling the CPU kernels and keeping them: wherever that fails, one warning, and torch operations go on."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphaadam_dist import AlphaAdam, kernels, paths
from alphaadam_dist.kernels import build, cpu, reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    for function in (kernels._problem, cpu._load, build.load):
        function.cache_clear()
    yield
    for function in (kernels._problem, cpu._load, build.load):
        function.cache_clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library that takes no time to compile, and a home of its own. Gives the home."""
    source = tmp_path / "empty.cpp"
    source.write_text("int nothing;\n")
    monkeypatch.setattr(build, "SOURCE", source)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("ALPHAADAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


def compiled() -> Path:
    return build.library(build.MACHINE_FLAGS)


def goes_on_after_one_warning(message: str) -> None:
    """A model above a million parameters steps, and ``fused=True`` says why it cannot."""
    param = nn.Parameter(torch.zeros(kernels.SMALL))
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match=f"going on with slower kernels, .* times as long .*{message}") as seen:
        AlphaAdam([param]).step()
    assert len(seen) == 1
    assert param[0] < 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AlphaAdam([param]).step()
        assert kernels.choose(None, CPU, kernels.SMALL) is reference
    with pytest.raises(ValueError, match=f"fused=True, but.*{message}"):
        AlphaAdam([param], fused=True).step()


# ---- no place to keep it


def a_file(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "taken").touch()
    monkeypatch.setenv("ALPHAADAM_CACHE", str(home / "taken"))


def under_a_file(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / ".cache").touch()


def no_home_to_make(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")


def nobody(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """HOME is not set, and the user has no entry that says where it is."""

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def kernels_is_a_file(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / ".cache/alphaadam-dist").mkdir(parents=True)
    (home / ".cache/alphaadam-dist/kernels").touch()


def full(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", no_space)


def read_only(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def refused(path: Any, *mode: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(build, "open", refused, raising=False)


def cannot_execute(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def refused(path: Any) -> None:
        error = OSError(f"Could not load this library: {path}")
        raise error from OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(torch.ops, "load_library", refused)


def made_by_another_torch(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def refused(path: Any) -> None:
        raise OSError(f"{path}: undefined symbol: _ZN2at4_ops5zeros4callE")

    monkeypatch.setattr(torch.ops, "load_library", refused)


def no_command(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("CXX", 'g++ "')


def no_compiler(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")


def a_failing_compiler_of_another_tongue(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    script = home / "c++"
    script.write_bytes(b"#!/bin/sh\nprintf 'Datei oder Verzeichnis \\374berf\\374llt' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


NOWHERE: list[tuple[Callable[..., None], str]] = [
    (a_file, r"no cache folder and none can be made.*taken.*set ALPHAADAM_CACHE"),
    (under_a_file, r"File exists.*set ALPHAADAM_CACHE to a folder of your own"),
    (no_home_to_make, r"/proc/nobody.*set ALPHAADAM_CACHE"),
    (nobody, r"home directory.*set ALPHAADAM_CACHE"),
    (kernels_is_a_file, r"cannot be kept in .*kernels.*set ALPHAADAM_CACHE"),
    (full, r"cannot be kept in .*No space left on device.*with space in it"),
    (read_only, r"cannot be kept in .*Read-only file system"),
    (cannot_execute, r"cannot be loaded.*failed to map segment.*from which programs may run"),
    (made_by_another_torch, r"cannot be loaded.*undefined symbol.*or to an empty one"),
    (no_command, r"CXX='g\+\+ \"' is no command.*No closing quotation"),
    (no_compiler, r"no C\+\+ compiler 'no-such-compiler -O2': install g\+\+, or set CXX"),
    (a_failing_compiler_of_another_tongue, r"failed:\sDatei oder Verzeichnis"),
]


@pytest.mark.parametrize(("trouble", "message"), NOWHERE, ids=[trouble.__name__ for trouble, _ in NOWHERE])
def test_the_reference_goes_on(
    trouble: Callable[..., None], message: str, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble(monkeypatch, quick)
    goes_on_after_one_warning(message)


def test_the_cache_folder_of_anything_else_says_what_to_set(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(monkeypatch, quick)
    with pytest.raises(OSError, match=r"no cache folder.*File exists.*set ALPHAADAM_CACHE to a folder of your own"):
        paths.cache_dir()


# ---- who may write there


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o022, 0o077])
def test_every_umask_works(umask: int, quick: Path) -> None:
    before = os.umask(umask)
    try:
        found = compiled()
    finally:
        os.umask(before)
    assert found.is_relative_to(quick / ".cache" / "alphaadam-dist" / "kernels")
    assert all(path.stat().st_mode & 0o022 == 0 for path in (found, *list(found.parents)[:2]))


def test_what_others_can_change_is_not_loaded(quick: Path) -> None:
    found = compiled()
    for path in (found, found.parent, found.parent.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(build.Unavailable, match=rf"{path} .* writable by others: chmod go-w"):
            compiled()
        path.chmod(mode)
    assert compiled() == found


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_root_is_loaded_and_what_belongs_to_another_user_is_not(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's image is built by root and run by others."""
    found = compiled()
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert compiled() == found
    os.chown(found, 1001, 1001)
    with pytest.raises(build.Unavailable, match="belongs to another user"):
        compiled()
    os.chown(found, 1000, 1000)
    assert compiled() == found


# ---- what is there already


def test_a_library_is_made_once_and_then_needs_no_writing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled()
    made = found.stat().st_mtime_ns
    assert sorted(path.suffix for path in found.parent.iterdir()) == ["", ".so"], "the library and the lock"
    for name in ("_compile", "open"):
        monkeypatch.setattr(build, name, None, raising=False)
    assert compiled() == found
    assert found.stat().st_mtime_ns == made


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder of another version"])
def test_a_damaged_library_is_made_anew(damage: str, quick: Path) -> None:
    """Loading one may end the process, and a bit may change a number."""
    found = compiled()
    whole = found.read_bytes()
    if damage == "cut":
        found.write_bytes(whole[: len(whole) // 2])
    elif damage == "bit":
        found.write_bytes(bytes([*whole[:5000], whole[5000] ^ 1, *whole[5001:]]))
    elif damage == "empty":
        found.write_bytes(b"")
    else:
        found.write_bytes(whole[: -build.DIGEST])
    assert compiled() == found
    torch.ops.load_library(found)
    assert build._whole(found)


def test_a_damaged_library_that_cannot_be_made_anew_is_not_loaded(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled()
    found.write_bytes(found.read_bytes()[:4000])
    monkeypatch.setattr(shutil, "which", lambda command: None)
    goes_on_after_one_warning(r"there is no C\+\+ compiler")


def test_a_file_system_without_locks(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build._whole(compiled())


# ---- Triton


def test_triton_that_cannot_compile_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No C compiler, no home folder for its cache: found out at the first step, not by the first launch in it."""
    triton = pytest.importorskip("alphaadam_dist.kernels.triton")
    monkeypatch.setattr(triton, "load", triton.load.__wrapped__)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "/root/.triton")

    monkeypatch.setattr(triton, "count", refused)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    with pytest.warns(UserWarning, match=r"going on with slower kernels.*PermissionError.*\.triton.*TRITON_CACHE_DIR"):
        assert kernels.choose(None, torch.device("cuda"), kernels.SMALL) is reference
    with pytest.raises(ValueError, match=r"fused=True, but Triton cannot compile kernels here"):
        kernels.choose(True, torch.device("cuda"), 1)


def test_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("alphaadam_dist.kernels.triton")
    monkeypatch.setitem(sys.modules, "alphaadam_dist.kernels.triton", None)
    with pytest.warns(UserWarning, match=r"going on with slower kernels.*alphaadam_dist\.kernels\.triton"):
        assert kernels.choose(None, torch.device("cuda"), kernels.SMALL) is reference


# ---- a process of its own


@pytest.mark.nightly
@pytest.mark.slow
def test_a_truncated_library_does_not_end_the_process(tmp_path: Path) -> None:
    """With the real kernels: cut to half, they are compiled again."""
    found = compiled()
    cut = tmp_path / "kernels" / found.name
    cut.parent.mkdir()
    cut.write_bytes(found.read_bytes()[: found.stat().st_size // 2])
    cut.chmod(0o755)
    code = (
        "import torch; from alphaadam_dist import AlphaAdam; p = torch.nn.Parameter(torch.zeros(2)); "
        "p.grad = torch.ones(2); AlphaAdam([p], fused=True).step(); print(float(p[0]) < 0)"
    )
    environment = {**os.environ, "ALPHAADAM_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
