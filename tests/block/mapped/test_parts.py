"""Tests of `xenbackend.block.mapped.parts`."""

from __future__ import annotations

import ctypes
from random import Random

from xenbackend.block.mapped.parts import Pool, allocate, cut
from xenbackend.block.request import PENDING, Op, clear


def test_cutting_keeps_every_byte() -> None:
    """However the memory is divided and wherever it is cut, the parts are views that hold the bytes in order."""
    chance = Random(1)
    for _ in range(300):
        views = [memoryview(bytearray(chance.randbytes(chance.choice([0, 512, 512, 1024, 4096])))) for _ in range(5)]
        whole = b"".join(views)
        lengths, left = [], len(whole)
        while left:
            lengths.append(min(left, 512 * chance.randint(1, 6)))
            left -= lengths[-1]
        parts = list(cut(views, lengths))

        assert lengths == [sum(map(len, part)) for part in parts]
        assert whole == b"".join(b"".join(part) for part in parts)
        clear([view for part in parts for view in part])
        assert bytes(len(whole)) == b"".join(views)


def test_parts_are_used_again() -> None:
    """A part that was given back is reused as if new, and the pool counts the parts in use."""
    pool = Pool()
    part = pool.take(Op.WRITE, 512, 1024, [memoryview(bytearray(1024))], lambda _: None, "tag")
    part.status = 5
    assert 1 == pool.lent
    pool.put(part)
    again = pool.take(Op.READ, 0, 0, (), lambda _: None, None)

    assert (part, PENDING, (), 1) == (again, again.status, again.iov, pool.lent)


def test_memory_is_aligned() -> None:
    """Memory for metadata is aligned to a page, as direct I/O needs it."""
    view = allocate(512)

    assert (512, 0) == (len(view), ctypes.addressof(ctypes.c_char.from_buffer(view)) % 4096)
