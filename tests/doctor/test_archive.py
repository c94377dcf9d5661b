"""The archive of a report."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path

import pytest

from xenbackend.doctor import archive
from xenbackend.doctor.pieces import Piece
from xenbackend.errors import ConfigError, XenbackendError

PIECES = [Piece("a.txt", "text \udcff\n", left_out=7), Piece("b.txt", problem="it hangs")]


def test_it_has_each_piece_and_says_what_it_has_not(tmp_path: Path) -> None:
    """All pieces lie in one directory, readable by the owner only, with a list; a missing piece is only in the list."""
    path = tmp_path / "r.tar.gz"
    archive.write(PIECES, path)
    with tarfile.open(path) as found:
        members = {each.name: each for each in found.getmembers()}
        listed = found.extractfile("r/contents.json")
        assert listed is not None
        values = json.loads(listed.read())

    assert {"r/contents.json", "r/a.txt"} == set(members)
    assert {0o600} == {each.mode for each in members.values()} | {path.stat().st_mode & 0o777}
    assert values == archive.contents(PIECES)
    assert [("a.txt", 12, 7, ""), ("b.txt", 0, 0, "it hangs")] == [tuple(each.values()) for each in values]


def test_nothing_is_written_over_and_nothing_is_left(tmp_path: Path) -> None:
    """An existing file is not overwritten; if the archive cannot be written there, no draft stays behind."""
    path = tmp_path / "r.tar.gz"
    path.write_text("kept")
    for place in (path, tmp_path / "none" / "r.tar.gz"):
        with pytest.raises(ConfigError, match=r"it exists; name a new file|cannot be written"):
            archive.write(PIECES, place)

    assert "kept" == path.read_text()
    assert [path] == list(tmp_path.iterdir())


def test_a_full_directory_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file system is no mistake of the operator, and no draft stays behind."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(XenbackendError, match="cannot be written: No space left on device") as found:
        archive.write(PIECES, tmp_path / "r.tar.gz")

    assert not isinstance(found.value, ConfigError)
    assert [] == [*tmp_path.iterdir()]
