"""Which files a cache uses, and which it refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_block import Machine, flush, read, write
from tests.recorded import Disk, RecordedFile, RecordedFiles, at, state, tears
from xenbackend.block.cache_parts import MAX_SLOTS
from xenbackend.block.formats.cache import BackHeader
from xenbackend.errors import DriverError

SIZE = 1 << 20


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Return two workers that know nothing of each other. Neither serves a guest, so dirty blocks stay in FILE."""
    machines = [Machine(), Machine()]
    machines[0].make_env.serves = machines[1].make_env.serves = False
    yield machines
    for each in machines:
        each.close()


def dirty(machine: Machine, tmp_path: Path) -> str:
    """Return the text of a closed chain, one of whose blocks is in the cache's file only."""
    (tmp_path / "image").write_bytes(bytes(SIZE))
    text = f"cache:{tmp_path}/cache,size=1M,mode=writeback|aio:{tmp_path}/image"
    chain = machine.open(text)
    assert [0] == machine.do(chain, write(4096, b"n" * 4096))
    chain.close()
    assert bytes(SIZE) == (tmp_path / "image").read_bytes()
    return text


def test_commands_see_what_is_dirty(machines: list[Machine], tmp_path: Path) -> None:
    """A command that only reads the chain sees dirty blocks. It writes nothing below, and nothing to FILE."""
    text = dirty(machines[0], tmp_path)
    before = (tmp_path / "cache").read_bytes()

    assert bytes(4096) + b"n" * 4096 + bytes(SIZE - 8192) == machines[1].contents(text)
    assert before == (tmp_path / "cache").read_bytes()
    assert bytes(SIZE) == (tmp_path / "image").read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("another image", "holds the only copy of 1 blocks of another disk; name another file, or remove this one"),
        ("changed", "what is below has been changed since then without this layer; if nobody wrote to the disk, touch"),
        ("size", "and was made with size=1048576,block=16384; use these values until nothing is dirty"),
        ("mode", "was used with mode=writeback, and may hold the only copy"),
        ("cut", "it has been truncated"),
        ("stranger", "it is not a file of cache:, and is left unchanged"),
        ("tags", "its map is damaged, or the disk below has shrunk: slot 1 has block 4294967295"),
    ],
)
def test_a_file_that_has_something_is_not_lost(
    machines: list[Machine], tmp_path: Path, change: str, problem: str
) -> None:
    """F3: if FILE holds dirty blocks, but disk, options or content do not fit, it is refused unchanged, with advice."""
    text, cache = dirty(machines[0], tmp_path), tmp_path / "cache"
    match change:
        case "another image":
            (tmp_path / "other").write_bytes(bytes(SIZE))
            (tmp_path / "other").rename(tmp_path / "image")
        case "changed":
            later = cache.stat().st_mtime_ns + 60 * 10**9
            os.utime(tmp_path / "image", ns=(later, later))
        case "size":
            text = text.replace("size=1M", "size=2M")
        case "mode":
            text = text.replace("writeback", "read")
        case "cut":
            os.truncate(cache, 1 << 20)
        case "stranger":
            cache.write_bytes(b"precious" * 1024)
        case "tags":
            with cache.open("r+b") as file:
                file.seek(4096 + 8)
                file.write(b"\0\0\0\0\1\0\0\0")
    before = cache.read_bytes()
    machines[1].make_env.serves = change == "mode"
    with pytest.raises(DriverError, match=problem):
        machines[1].open(text)
    assert before == cache.read_bytes()
    if change == "changed":
        os.utime(cache, ns=(later, later))
        assert b"n" * 4096 == machines[1].contents(text)[4096:8192]


def test_what_went_below_last_is_no_change_of_others(machines: list[Machine], tmp_path: Path) -> None:
    """A late write below by the cache itself is not taken for somebody else's: closing renews FILE's time of change."""
    image, cache = tmp_path / "image", tmp_path / "cache"
    image.write_bytes(bytes(SIZE))
    text = f"cache:{cache},size=1M,mode=writeback|aio:{image}"
    chain = machines[0].open(text)
    assert [0, 0] == [*machines[0].do(chain, write(0, b"n" * 4096)), *machines[0].do(chain, flush())]
    os.utime(cache, ns=(0, image.stat().st_mtime_ns - 60 * 10**9))
    chain.close()

    assert b"n" * 4096 == machines[1].contents(text)[:4096]


def test_a_file_that_has_nothing_is_begun_anew(machines: list[Machine], tmp_path: Path) -> None:
    """If FILE holds nothing dirty, but mode, size or disk differ, it is recreated without its former content."""
    image, cache = tmp_path / "image", tmp_path / "cache"
    image.write_bytes(bytes(SIZE))
    for machine, options in zip(machines, ("size=1M,mode=read", "size=2M,mode=writeback"), strict=True):
        machine.make_env.serves = True
        chain = machine.open(f"cache:{cache},{options}|aio:{image}")
        assert [0, 0] == machine.do(chain, write(0, bytes(512)), read(4096, 512))
        chain.close()
        (tmp_path / "other").write_bytes(bytes(SIZE))
        (tmp_path / "other").rename(image)

    assert bytes(SIZE) == image.read_bytes()


def test_a_header_of_more_than_there_can_be(machines: list[Machine], tmp_path: Path) -> None:
    """F3: a header that claims more slots than are possible is refused, without reading the holes behind it."""
    image, cache = tmp_path / "image", Path(f"/dev/shm/{tmp_path.name}")
    image.write_bytes(bytes(SIZE))
    header = BackHeader((MAX_SLOTS + 1) * 4096, 4096, "x", bytes(16))
    try:
        cache.write_bytes(header.pack())
        os.truncate(cache, header.file_size)
        with pytest.raises(
            DriverError, match="its header is damaged: 16777217 slots, more than the 16777216 that are possible"
        ):
            machines[0].open(f"cache:{cache},size=1M,mode=writeback|aio:{image}")
    finally:
        cache.unlink()


@pytest.mark.parametrize(
    ("former", "later"), [("size=1M", "size=2M"), ("size=2M", "size=1M"), ("size=2M,mode=read", "size=1M")]
)
def test_killed_while_it_is_begun_anew(tmp_path: Path, former: str, later: str) -> None:
    """If a worker is killed or power fails while FILE is recreated, the next one recreates it, without former maps."""
    path, image = at(tmp_path / "cache"), RecordedFile(bytearray(64 << 10))
    file = RecordedFile(bytearray(4096))
    if "mode" not in former:
        former += ",mode=writeback"
    Disk(f"cache:{path},{former}|aio:image", RecordedFiles(**{path: file, "image": image}))
    start, begun = bytes(file.bytes), len(file.log)
    text = f"cache:{path},{later},mode=writeback|aio:image"
    Disk(text, RecordedFiles(**{path: file, "image": image}))
    log = file.log[begun:]
    for count, torn in tears(log):
        left = state(start, log, count, torn)
        assert not count or left[:4096] != start[:4096]
        disk = Disk(text, RecordedFiles(**{path: RecordedFile(left), "image": image}))
        assert bytes(64 << 10) == disk.everything()
