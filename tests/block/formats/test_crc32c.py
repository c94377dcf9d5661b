"""The checksum that VHDX uses."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.block.formats.crc32c import crc32c


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_checksums(data: bytes, checksum: int) -> None:
    """The checksum is that of RFC 3720, appendix B.4, and of the well-known test string."""
    assert checksum == crc32c(data)


def bit_by_bit(data: bytes) -> int:
    """Return the checksum, calculated bit by bit from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 1000, 4096, 4099])
def test_lengths(length: int) -> None:
    """For all lengths, with and without a remainder, the checksum is the same as bit by bit."""
    data = Random(length).randbytes(length)

    assert bit_by_bit(data) == crc32c(data)
