"""A JSON object in memory that outlives the process, whole at any moment at which that may be killed.

Must not know what the object says, nor believe what it reads: a worker that a guest has taken over may write anything.

Some words of 64 bits, and two copies, each with its length before it. The copy that is not valid is written, then made
valid by the store of one word. So there must be one writer at a time.
"""

from __future__ import annotations

import json
from struct import Struct
from typing import Any

MAGIC = 0x4A4B4C42_4E4558  # "XENBLKJ"
WORDS = 8  # at the head that anybody looks at
_LENGTH = Struct("Q")  # bytes of JSON, before it


class Note:
    """An object that is replaced as a whole: whoever is killed while writing leaves the former one."""

    def __init__(self, words_at: int, word: int, places: tuple[int, int], size: int, version: int) -> None:
        """Lie in two copies of `size` bytes at `places`; word `word` of those at `words_at` says which one is valid.

        The first two words are MAGIC and `version`.
        """
        self._words_at = words_at
        self._word = word
        self._places = places
        self._room = size - _LENGTH.size
        self._version = version

    def write(self, memory: memoryview, value: dict[str, Any] | None) -> None:
        """Replace the value; None: there is none from now on. Raises: ValueError when it is too long."""
        words = self._words(memory)
        if words[0] != MAGIC:
            words[1] = self._version
            words[0] = MAGIC
        if value is None:
            words[self._word] = 0
            return
        text = json.dumps(value).encode()
        if len(text) > self._room:
            raise ValueError(f"{len(text)} bytes do not fit into a note, which has room for {self._room}")
        copy = 2 if words[self._word] == 1 else 1
        place = self._places[copy - 1]
        _LENGTH.pack_into(memory, place, len(text))
        memory[place + _LENGTH.size : place + _LENGTH.size + len(text)] = text
        words[self._word] = copy

    def read(self, memory: memoryview) -> dict[str, Any] | None:
        """Return the value, None where there is none: nobody wrote one, or what lies there is not what `write` left.

        What the object holds is the caller's to check.
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
        except (ValueError, RecursionError):  # also of bytes that are no text, and of brackets without an end
            return None
        return value if isinstance(value, dict) else None

    def _words(self, memory: memoryview) -> memoryview:
        return memory[self._words_at : self._words_at + 8 * WORDS].cast("Q")
