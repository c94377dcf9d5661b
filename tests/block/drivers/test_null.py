"""The driver null."""

from __future__ import annotations

import pytest

from tests.helpers_block import Machine, content, discard, flush, read, write


@pytest.mark.parametrize("length", [512, 4096, 8192, 65536, 1 << 20, 3 << 20])
def test_reads_are_zeros_whatever_the_buffer_held(machine: Machine, length: int) -> None:
    """A read fills every byte of its buffer with zeros, because the buffer may hold another guest's data."""
    chain = machine.open("null:1G")
    request = read(0, length, 512)

    assert [0, 0, 0, 0] == machine.do(chain, write(0, b"x" * 512), request, flush(), discard(0, length))
    chain.close()
    assert bytes(length + 512) == content(request)


def test_the_size_is_what_was_asked_for(machine: Machine) -> None:
    """The disk has the size asked for, or 1 GiB."""
    sizes = []
    for text in ("null:", "null:1T"):
        chain = machine.open(text)
        sizes.append(chain.geometry.size)
        chain.close()

    assert [1 << 30, 1 << 40] == sizes
