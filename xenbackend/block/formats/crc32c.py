"""CRC-32C, the checksum of VHDX: the polynomial of iSCSI. No library that we use has it.

Source: RFC 3720, 12.1 and appendix B.4. Must not do anything else.

Byte by byte, a MiB would take 0.2 s. So data are cut into lanes of 64 bytes, and one step does one byte of every lane:
table look-ups are one `bytes.translate`, and the exclusive or of many bytes is that of two long integers. The lanes'
checksums are combined by the effect that 64 zero bytes have on a checksum, which is a table, too: CRCs are linear.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.block.formats.words import unpack

_POLYNOMIAL = 0x82F63B78  # its bits in reverse
_LANE = 64  # bytes
_ONES = 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Return the checksum of `data`."""
    whole = len(data) // _LANE * _LANE
    crc = _ONES
    first, second, third, fourth = _AFTER
    for lane in _lanes(data[:whole]):
        crc = first[crc & 0xFF] ^ second[crc >> 8 & 0xFF] ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24] ^ lane
    for byte in data[whole:]:
        crc = _BYTE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ _ONES


def _lanes(data: bytes) -> list[int]:
    """Return the checksum of each lane, initially 0 and not inverted; `planes[n]` has byte n of all of them."""
    count = len(data) // _LANE
    planes = [0] * 4
    for place in range(_LANE):
        index = (int.from_bytes(data[place::_LANE], "little") ^ planes[0]).to_bytes(count, "little")
        planes = [
            int.from_bytes(index.translate(table), "little") ^ above
            for table, above in zip(_PLANES, [*planes[1:], 0], strict=True)
        ]
    words = bytearray(4 * count)
    for number, plane in enumerate(planes):
        words[number::4] = plane.to_bytes(count, "little")
    return list(unpack("I", bytes(words), "little"))


def _table(of_bit: Callable[[int], int], first: int) -> list[int]:
    """Return the table of a linear function for a byte at bits `first` on; `of_bit` is the function for one bit."""
    table = [0]
    for number in range(1, 256):
        rest = number & number - 1
        table.append(table[rest] ^ of_bit((number ^ rest) << first))
    return table


def _after_bits(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc


def _after_lane(crc: int) -> int:
    for _ in range(_LANE):
        crc = _BYTE[crc & 0xFF] ^ crc >> 8
    return crc


_BYTE = _table(_after_bits, 0)
_PLANES = [bytes(word >> 8 * plane & 0xFF for word in _BYTE) for plane in range(4)]
_AFTER = [_table({1 << bit: _after_lane(1 << bit) for bit in range(32)}.__getitem__, 8 * byte) for byte in range(4)]
