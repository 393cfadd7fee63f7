"""Files on disks that are full, files that were changed: the error names the file and what to do."""

import errno
import os
from pathlib import Path

import pytest

from alphaadam_dist.files import digest, naming, read_object, sentence, what_stops_writing, write_whole
from tests.checkpoint.test_files import largest_file


def test_what_the_system_refused_in_one_sentence():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file")
    assert sentence(full) == "/disk/file: no space left on device: make room there"
    assert sentence(OSError(errno.EROFS, os.strerror(errno.EROFS))) == (
        "read-only file system: give a path that can be written to"
    )
    assert sentence(OSError("a library's own words")) == "a library's own words"


def test_a_full_disk_is_named_by_its_file():
    """The system itself names only what it cannot open."""
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"), naming(Path("/dev/full")):
        Path("/dev/full").write_text("x")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path):
    path = tmp_path / "held.json"
    write_whole(path, "before")
    with largest_file(4), pytest.raises(OSError, match="File too large") as refused:
        write_whole(path, "much longer than that")
    assert refused.value.filename == str(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["held.json"]


@pytest.mark.parametrize(
    ("held", "wrong"),
    [
        (b'{"a": ', "is cut short or no JSON"),
        (b"\xff\x00", "is cut short or no JSON"),
        (b"[" * 10**5, "is cut short or no JSON"),
        (b"[1]", "holds a JSON list where an object belongs"),
        (b"null", "holds a JSON NoneType where an object belongs"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path: Path, held: bytes, wrong: str):
    path = tmp_path / "held.json"
    path.write_bytes(held)
    with pytest.raises(ValueError, match=f"{path} {wrong}.*: mend it"):
        read_object(path, "mend it")
    path.write_bytes(b'{"a": 1}')
    assert read_object(path, "mend it") == {"a": 1}


def test_a_digest_follows_names_and_contents_and_nothing_else(tmp_path: Path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    before = digest(tmp_path)
    os.utime(tmp_path / "a", (0, 0))
    (tmp_path / ".hidden").write_text("3")
    assert digest(tmp_path) == before
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("1")
    assert digest(tmp_path) != before


def test_what_stops_writing_is_what_the_next_writer_meets(tmp_path: Path):
    (tmp_path / "last").write_bytes(bytes(5000))
    assert what_stops_writing(tmp_path) is None
    assert os.listdir(tmp_path) == ["last"]
    with largest_file(4096):
        refused = what_stops_writing(tmp_path)
    assert refused is not None
    assert (refused.errno, refused.filename) == (errno.EFBIG, str(tmp_path / "last"))


def test_what_stopped_a_library_in_rust_stands_in_its_message(tmp_path: Path):
    """A megabyte may find room again where a large file found none."""
    (tmp_path / "model").write_text("half")
    refused = what_stops_writing(tmp_path, "I/O error: No space left on device (os error 28)")
    assert refused is not None
    assert sentence(refused) == f"{tmp_path / 'model'}: no space left on device: make room there"
