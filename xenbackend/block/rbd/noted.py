"""One short text in a memory that outlives the process, whole at any moment at which that may be killed.

Must not be read by two at a time, nor trusted for more than its checksum says.

Two slots take turns: the newer one with a right checksum counts.
"""

from __future__ import annotations

import struct
import zlib

SIZE = 8192  # bytes of the memory: an identity has two names of `target.MAX_NAME` bytes
_SLOT = SIZE // 2
_HEAD = struct.Struct("<IIQ")  # checksum of all that follows, bytes of the text, number
MAX_TEXT = _SLOT - _HEAD.size  # bytes


class Noted:
    """The text in a memory of SIZE bytes; zeros are an empty one."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._number, self._text = max(self._slot(0), self._slot(1))

    @property
    def text(self) -> str:
        """The text."""
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        data = text.encode(errors="surrogateescape")
        if len(data) > MAX_TEXT:
            raise ValueError(f"a text of {len(data)} bytes does not fit into a slot of {MAX_TEXT}")
        self._number, self._text = self._number + 1, text
        body = struct.pack("<IQ", len(data), self._number) + data.ljust(MAX_TEXT, b"\0")
        start = self._number % 2 * _SLOT
        self._memory[start : start + _SLOT] = struct.pack("<I", zlib.crc32(body)) + body

    def _slot(self, place: int) -> tuple[int, str]:
        slot = bytes(self._memory[place * _SLOT : (place + 1) * _SLOT])
        checksum, length, number = _HEAD.unpack_from(slot)
        if length > MAX_TEXT or checksum != zlib.crc32(slot[4:]):
            return 0, ""
        return number, slot[_HEAD.size : _HEAD.size + length].decode(errors="surrogateescape")
