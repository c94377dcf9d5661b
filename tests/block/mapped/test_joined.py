"""Ranges of several files, joined into one."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.helpers_block import Machine, flush, read
from xenbackend.block.driver import File
from xenbackend.block.mapped.joined import Joined
from xenbackend.block.request import PENDING, Request

SECTOR = 512


class Closing:
    """A file that counts how often it was closed."""

    def __init__(self, closed: list[str], name: str, *, fails: bool = False) -> None:
        self.closed, self.name, self.fails = closed, name, fails
        self.mode = name
        self.physical_sector_size = 4096 if name == "one" else 512

    def close(self) -> None:
        """Count the call."""
        self.closed.append(self.name)
        if self.fails:
            raise OSError(errno.EIO, self.name)


def opened(machine: Machine, path: Path, data: bytes) -> File:
    """Write a file and open it."""
    path.write_bytes(data)
    return machine.files.open(str(path), read_only=True, step=SECTOR)


def done(machine: Machine, joined: Joined, *batch: Request) -> list[int]:
    """Do requests, and return their status."""
    left = set(batch)

    def take(back: list[Request]) -> None:
        left.difference_update(back)
        machine.reactor.stop()

    joined.complete = take
    for request in batch:
        request.status = PENDING
    joined.submit(list(batch))
    while left:
        machine.reactor.run()
    return [request.status for request in batch]


def test_ranges_of_files(machine: Machine, tmp_path: Path) -> None:
    """A request goes to the file that has its place. Beyond the end of a range are zeros, not the file's next bytes."""
    joined = Joined()
    one = opened(machine, tmp_path / "one", b"".join(bytes([each]) * SECTOR for each in range(8)))
    bases = [joined.add(one, 2 * SECTOR, 2 * SECTOR)]
    bases.append(joined.add(opened(machine, tmp_path / "two", b"x" * 700), 0, 700))
    bases.append(joined.add(one, 7 * SECTOR, SECTOR))
    requests = [
        read(bases[0], SECTOR, SECTOR, SECTOR), read(bases[1], SECTOR, 1024), read(bases[2], SECTOR), flush(),
        read(bases[0] + 2 * SECTOR, SECTOR), read(bases[1] + SECTOR, 188, 836),
    ]  # fmt: skip

    seen = [list(request.iov) for request in requests]
    assert [0] * 6 == done(machine, joined, *requests)
    assert [b"\2\3\0", b"xx", b"\7", b"", b"\0", b"x\0"] == [
        b"".join(bytes(view[:1]) for view in views) for views in seen
    ]
    assert b"x" * 188 + bytes(836) == b"".join(seen[-1])
    joined.close()


def test_reading_at_a_place(machine: Machine, tmp_path: Path) -> None:
    """Blocking reads end where the range ends."""
    joined = Joined()
    one = opened(machine, tmp_path / "one", bytes(range(256)) * 4)
    joined.add(one, 10, 20)
    base = joined.add(one, 100, 5)

    assert (bytes(range(15, 30)), bytes(range(102, 105))) == (joined.read_at(5, 99), joined.read_at(base + 2, 99))
    assert (b"", one.mode) == (joined.read_at(base + 50, 9), joined.mode)
    joined.close()


def test_holes_and_places(machine: Machine, tmp_path: Path) -> None:
    """The file that has a place says where its data are, up to the end of the range. Places can be translated."""
    (tmp_path / "one").write_bytes(b"d" * 4096)
    with (tmp_path / "one").open("r+b") as file:
        file.truncate(1 << 20)
    joined = Joined()
    one = machine.files.open(str(tmp_path / "one"), read_only=True, step=SECTOR)
    first = joined.add(one, 0, 1 << 20)
    second = joined.add(one, 1024, 2048)

    assert [(0, 4096), (1 << 20, 1 << 20)] == [joined.next_data(first), joined.next_data(first + 4096)]
    assert (second + 512, second + 2048) == joined.next_data(second + 512)
    assert (1536, one.allocated) == (joined.place_in_file(second + 512), joined.allocated)
    joined.close()


def test_nothing_is_written() -> None:
    """Writes and discards are refused, and there is nothing to sync."""
    joined = Joined()
    for call in (lambda: joined.write_at(0, b"x"), lambda: joined.grow(1)):
        with pytest.raises(OSError, match="only read"):
            call()
    joined.sync()


def test_all_files_are_closed() -> None:
    """Each file is closed once, even if closing one of them fails."""
    closed: list[str] = []
    joined = Joined()
    one, two = (Closing(closed, name, fails=name == "one") for name in ("one", "two"))
    for file in (one, two, one):
        joined.add(file, 0, 512)
    joined.close()

    assert ["one", "two"] == closed
    assert 4096 == joined.physical_sector_size  # the largest of them
