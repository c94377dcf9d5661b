"""What a write-back cache sends to FILE and to the layer below; tests/block/test_write_back.py tests it in a disk."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests.block.test_write_back import Life
from tests.helpers_block import flush, read, write
from xenbackend.block.request import Op


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("which", ["image", "cache"])
def test_a_flush_of_our_own_that_failed_is_told(tmp_path: Path, which: str, *, is_killed: bool) -> None:
    """If a flush of the cache's own fails, the guest's next flush fails, and only that one, because the kernel reports
    lost data only once. This also holds if the worker is killed before it could tell the guest: its successor does.
    """
    life = Life(tmp_path, Random(1), size=400 << 10)
    assert [0] == life.disk.do(write(100 << 10, b"a" * (200 << 10)))  # too large for FILE: it goes below
    assert [0] == life.disk.do(write(0, b"n" * 4096))
    file = life.image if which == "image" else life.file
    failed: list[int] = []
    file.fails = lambda request: (failed.append(1), errno.EIO)[1] if request.op == Op.FLUSH and not failed else 0
    while not failed:
        life.rest()
        life.run()
    if is_killed:
        life.kill()

    assert [errno.EIO] == life.disk.do(flush())
    assert [0] == life.disk.do(flush())
    life.kill()
    assert [0] == life.disk.do(flush())


def test_below_is_flushed_only_for_what_went_there(tmp_path: Path) -> None:
    """Guests wait for a flush of the layer below only if something was written there since its last flush."""
    life = Life(tmp_path, Random(1))
    assert [0] == life.disk.do(flush())  # a predecessor may have left something
    for number in range(5):
        assert [0, 0] == [*life.disk.do(write(number << 12, b"n" * 4096)), *life.disk.do(flush())]

    assert ["flush"] == [each.kind for each in life.image.log]


def test_a_file_that_fails_is_given_nothing_more(tmp_path: Path) -> None:
    """After 16 errors in a row, FILE is not written to any more: reads and writes go past it, and a fact says so."""
    life = Life(tmp_path, Random(1))
    assert [0] == life.disk.do(read(64 << 10, 4096))  # FILE has it too, but is not needed for it
    life.file.fails = lambda request: errno.EIO if request.op == Op.WRITE else 0
    for number in range(16):
        assert [0] == life.disk.do(write(number << 12, b"n" * 4096))
    assert [0] == life.disk.do(write(64 << 10, b"n" * 512))
    life.file.fails = lambda request: 0
    assert life.figures()["errors"] >= 16
    assert "no more blocks are put into it" in life.top.env.facts["cache"]
    assert [0, 0] == life.disk.do(write(0, b"m" * 4096), read(40960, 512))

    assert (0, b"m" * 4096) == (life.figures()["dirty"], life.image.bytes[:4096])
