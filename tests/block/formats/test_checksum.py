"""The file of `checksum:`."""

from __future__ import annotations

import pytest

from xenbackend.block.formats.checksum import PAGE, SUMS, Header, sum_of


@pytest.mark.parametrize("size", [512, 4096, 5 << 30, (1 << 42) + 512])
def test_a_header_comes_back_and_nothing_touches(size: int) -> None:
    """A header is read back as packed. Header, log and sums do not overlap; each page of sums has a byte in the log."""
    header = Header(size, 4096, "aio; file inode=7", bytes(range(16)))

    assert header == Header.parse(header.pack())
    assert PAGE + header.log_size == header.sums_at
    assert header.blocks <= header.pages * SUMS
    assert header.pages <= header.log_size
    assert header.sums_at + 4 * header.blocks <= header.file_size


def test_a_sum_tells_a_block_in_another_place() -> None:
    """The same bytes have another sum in each block. No sum is 0, which means that it is unknown."""
    assert len({sum_of(bytes(4096), block) for block in range(1000)}) == 1000
    assert 0 not in {sum_of(b"", block) for block in range(1000)}
