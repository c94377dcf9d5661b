"""The driver offset."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, content, discard, flush, read, write
from xenbackend.errors import DriverError


def test_only_the_range_is_touched(machine: Machine, tmp_path: Path) -> None:
    """Bytes before and behind the range never change, whatever the guest does at the ends of its disk."""
    path, before = tmp_path / "img", Random(1).randbytes(1 << 20)
    path.write_bytes(before)
    chain = machine.open(f"offset:start=68K,length=100K|aio:{path}")
    size, start = 100 << 10, 68 << 10
    asked = read(0, size)

    assert size == chain.geometry.size
    assert [0] == machine.do(chain, asked)
    assert before[start : start + size] == content(asked)
    assert [0, 0, 0] == machine.do(chain, write(0, b"a" * 4096), write(size - 512, b"z" * 512), discard(8192, 4096))
    assert [0] == machine.do(chain, flush())
    chain.close()
    expected = bytearray(before)
    expected[start : start + 4096], expected[start + size - 512 : start + size] = b"a" * 4096, b"z" * 512
    expected[start + 8192 : start + 12288] = bytes(4096)
    assert expected == path.read_bytes()


def test_without_a_length_it_reaches_to_the_end(machine: Machine, tmp_path: Path) -> None:
    """Without `length` the disk extends to the end of the layer below and grows with it. `start` must be before it."""
    path = tmp_path / "img"
    sizes = []
    for size in (1 << 20, 2 << 20):
        path.write_bytes(bytes(size))
        chain = machine.open(f"offset:start=64K|aio:{path}")
        sizes.append(size - chain.geometry.size)
        chain.close()

    assert [64 << 10] * 2 == sizes
    with pytest.raises(DriverError, match="the layer below has only"):
        machine.open(f"offset:start=4M|aio:{path}")
