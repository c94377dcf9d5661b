"""Tests of `xenbackend.image.remote`: disks of servers as targets. tests/engines has a real cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.nbd_server import HAS_FLAGS, Export, Server
from xenbackend.block.spec import parse_chain
from xenbackend.cli.main import main
from xenbackend.errors import ConfigError
from xenbackend.image.remote import convert, find_remote, take_lock

SIZE = 4 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Return a server whose disk is full of data."""
    with Server(tmp_path / "nbd.sock", Export(bytearray(b"x" * SIZE))) as server:
        yield server


@pytest.mark.parametrize(
    ("text", "is_remote"),
    [
        ("rbd:a/b", True),
        ("nbd:host:1", True),
        ("aio:/img", False),
        ("/img", False),
        ("log:|nbd:host:1", False),
        ("ram:1M", False),
    ],
)
def test_what_is_remote(text: str, *, is_remote: bool) -> None:
    """A single layer of a server or cluster is remote. All other texts are left to others."""
    assert is_remote == (find_remote(text) is not None)


@pytest.mark.parametrize("flags", [HAS_FLAGS | 4, HAS_FLAGS], ids=["flush", "without"])
def test_what_a_server_has_is_written_over(server: Server, tmp_path: Path, flags: int) -> None:
    """A server's disk is overwritten up to the source's end, zeros included, even without flush, and is read back."""
    server.export.flags = flags
    source, back = tmp_path / "source.img", tmp_path / "back.img"
    with source.open("wb") as file:
        file.write(Random(1).randbytes(1 << 20))
        file.truncate(SIZE - 4096)
    target = f"nbd:unix:{server.path},drain=0s"
    assert 0 == main(["image", "convert", "--quiet", "--overwrite", f"aio:{source}", target])
    assert source.read_bytes() + b"x" * 4096 == server.export.content
    assert 0 == main(["image", "convert", "--quiet", target, f"aio:{back}"])
    assert server.export.content == back.read_bytes()


def test_nothing_is_written_over_by_mistake(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server's disk exists already, so only --overwrite writes to it. Options for files are refused."""
    source = tmp_path / "source.img"
    source.write_bytes(bytes(SIZE))
    target = f"nbd:unix:{server.path},drain=0s"
    for words, why in (
        ([], "to overwrite all of its content"),
        (["--resume"], "starts again"),
        (["--fixed"], "no such options"),
    ):
        assert 2 == main(["image", "convert", "--quiet", *words, f"aio:{source}", target])
        assert why in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists already"):
        convert(parse_chain(f"aio:{source}"), parse_chain(target), lambda *_: None)
    assert b"x" * SIZE == server.export.content


def test_what_has_no_lock_is_not_taken() -> None:
    """Only an image of a cluster has a lock that can be taken."""
    with pytest.raises(ConfigError, match="is not an image of a cluster"):
        take_lock(parse_chain("nbd:host:1"), "client.1")
