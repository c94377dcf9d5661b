"""A short text in a memory that outlives the process, complete whenever the process may be killed (`note`).

Must not be written by two processes at a time.
"""

from __future__ import annotations

from xenbackend.note import WORDS, Note

_ROOM = 16384  # bytes of a copy: an identity has two names of `target.MAX_NAME` bytes, each of which may take six here
_AT = 8 * WORDS
SIZE = _AT + 2 * _ROOM  # bytes of the memory
_NOTE = Note(0, 2, (_AT, _AT + _ROOM), _ROOM, version=1)


class Noted:
    """The text in a memory of SIZE bytes. Zeros, and content that is not from here, count as an empty text."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    @property
    def text(self) -> str:
        """The present text."""
        found = (_NOTE.read(self._memory) or {}).get("text")
        return found if isinstance(found, str) else ""

    @text.setter
    def text(self, text: str) -> None:
        _NOTE.write(self._memory, {"text": text})
