"""New files, which appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xenbackend.block.formats.blank import Blank
from xenbackend.errors import ConfigError
from xenbackend.opener.newfile import publish, refuse_existing, replace_durably, write_new


def test_a_new_file_holds_its_pieces(tmp_path: Path) -> None:
    """A new file has its pieces, with holes between, is readable by its owner only, and leaves nothing beside it."""
    write_new(f"{tmp_path}/new", Blank(10, [(0, b"ab"), (8, b"yz")]))

    assert {"new": b"ab\0\0\0\0\0\0yz"} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert 0o600 == (tmp_path / "new").stat().st_mode & 0o777


@pytest.mark.parametrize("kind", ["file", "link"])
def test_nothing_is_written_over(tmp_path: Path, kind: str) -> None:
    """A name that exists is refused, even if it is a link that leads nowhere, and what is there stays."""
    path = tmp_path / "taken"
    if kind == "file":
        path.write_bytes(b"mine")
    else:
        path.symlink_to("nowhere")

    with pytest.raises(ConfigError, match="exists already"):
        write_new(str(path), Blank(10))
    assert [path] == list(tmp_path.iterdir())


def test_a_name_that_is_taken_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    """If the name appears meanwhile, publishing fails and does not replace that file."""
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"mine")

    with pytest.raises(ConfigError, match="appeared meanwhile"):
        publish(f"{tmp_path}/a", f"{tmp_path}/b")
    assert b"mine" == (tmp_path / "b").read_bytes()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a file cannot be completed, no temporary file is left."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full") as problem:
        write_new(f"{tmp_path}/new", Blank(10, [(0, b"x")]))

    assert f"{tmp_path}/new" == problem.value.filename
    assert [] == list(tmp_path.iterdir())


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    """If the directory does not exist, the error names it."""
    with pytest.raises(ConfigError, match=r"no directory .*/none;"):
        refuse_existing(f"{tmp_path}/none/new")


def test_a_small_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is full, the former file stays, nothing is left beside it, and the error names it."""
    replace_durably(f"{tmp_path}/state", b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full") as problem:
        replace_durably(f"{tmp_path}/state", b"two")

    assert f"{tmp_path}/state" == problem.value.filename
    assert {"state": b"one"} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("path", ["/proc/new", "{directory}/" + "x" * 300])
def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path, path: str) -> None:
    """An error names the file that was asked for, and not its temporary name, which is gone by then."""
    path = path.format(directory=tmp_path)
    with pytest.raises(OSError, match=r"No such file|too long") as problem:
        write_new(path, Blank(10))

    assert (path, None) == (problem.value.filename, problem.value.filename2)
    assert [] == list(tmp_path.iterdir())


def test_a_small_file_is_replaced(tmp_path: Path) -> None:
    """The former file is replaced, and nothing is left beside it."""
    for data in (b"one", b"two"):
        replace_durably(f"{tmp_path}/state", data)

    assert {"state": b"two"} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
