"""A JSON object in memory that outlives the process, and stays whole whenever the process is killed.

Must not know what the object means, nor trust what it reads: a worker that a guest has taken over may write anything.

The memory has some words of 64 bits, and two copies of the object, each preceded by its length. A writer fills the copy
that is not valid, and makes it the valid one by storing one word. So there must be only one writer at a time.
"""

from __future__ import annotations

import json
from struct import Struct
from typing import Any

MAGIC = 0x4A4B4C42_4E4558  # "XENBLKJ"
WORDS = 8  # at the head; only these are read
_LENGTH = Struct("Q")  # bytes of JSON that follow


class Note:
    """An object that is replaced as a whole: if a writer is killed, the previous object stays valid."""

    def __init__(self, words_at: int, word: int, places: tuple[int, int], size: int, version: int) -> None:
        """Use two copies of `size` bytes at `places`, and WORDS words at `words_at`.

        The first two words are MAGIC and `version`; word number `word` says which copy is valid.
        """
        self._words_at = words_at
        self._word = word
        self._places = places
        self._room = size - _LENGTH.size
        self._version = version

    def write(self, memory: memoryview, value: dict[str, Any] | None, *, reserved: int = 0) -> None:
        """Replace the value; None removes it. Raises: ValueError if it leaves less than `reserved` bytes of room."""
        words = self._words(memory)
        if words[0] != MAGIC:
            words[1] = self._version
            words[0] = MAGIC
        if value is None:
            words[self._word] = 0
            return
        text = json.dumps(value).encode()
        if len(text) + reserved > self._room:
            raise ValueError(f"{len(text) + reserved} bytes do not fit into a note, which has room for {self._room}")
        copy = 2 if words[self._word] == 1 else 1
        place = self._places[copy - 1]
        _LENGTH.pack_into(memory, place, len(text))
        memory[place + _LENGTH.size : place + _LENGTH.size + len(text)] = text
        words[self._word] = copy

    def read(self, memory: memoryview) -> dict[str, Any] | None:
        """Return the value, None if there is none: nothing was written, or the memory holds something else.

        The caller has to check what the object contains.
        """
        magic, version, *_ = words = self._words(memory).tolist()
        if magic != MAGIC or version != self._version or words[self._word] not in (1, 2):
            return None
        place = self._places[words[self._word] - 1]
        (length,) = _LENGTH.unpack_from(memory, place)
        if length > self._room:
            return None
        try:
            value = json.loads(bytes(memory[place + _LENGTH.size : place + _LENGTH.size + length]))
        except (ValueError, RecursionError):  # ValueError: also invalid UTF-8; RecursionError: nesting is too deep
            return None
        return value if isinstance(value, dict) else None

    def _words(self, memory: memoryview) -> memoryview:
        return memory[self._words_at : self._words_at + 8 * WORDS].cast("Q")
