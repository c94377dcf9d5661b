"""The memory that a worker shares with its guest and its successor. It announces every access beforehand.

Must not know what is written: the listener may let others move first, record the state, or end the worker there.

Each word is one store. A slot is one access, because nobody looks at it before the word that refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from xenbackend.blkif.abi import Layout

RING, STORE = 1, 2  # kinds of an access: it is visible to the guest, it is a store that a successor sees


class Words:
    """An array of words: a list of its own, or a view that others read too."""

    def __init__(self, raw: Any, before: Callable[[int], None], kind: int, reads: Callable[[int], None]) -> None:
        self.raw = raw
        self._before = before
        self._kind = kind
        self._note_read = reads

    @property
    def nbytes(self) -> int:
        """Return the length in bytes."""
        return 8 * len(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[int]:
        return iter(self.raw)

    def __getitem__(self, place: int) -> int:
        if self._kind & RING:
            self._before(RING)
            self._note_read(self.raw[place])
        value: int = self.raw[place]
        return value

    def __setitem__(self, place: int | slice, value: Any) -> None:
        if isinstance(place, slice):
            for each, word in zip(range(*place.indices(len(self.raw))), value, strict=True):
                self[each] = word
        else:
            self._before(self._kind | STORE)
            self.raw[place] = value


class WordStruct:
    """Stands in for `Struct("@nQ")` on this memory: consecutive words."""

    def pack_into(self, words: Words, offset: int, *values: int) -> None:
        """Store the words."""
        for place, value in enumerate(values, offset // 8):
            words[place] = value


class Pages:
    """The ring's bytes, from which slots are copied."""

    def __init__(self, raw: memoryview, before: Callable[[int], None]) -> None:
        self.raw = raw
        self._before = before

    def __getitem__(self, place: slice) -> memoryview:
        self._before(RING)
        return self.raw[place]

    def writer(self, layout: Layout, look: Callable[[int], None]) -> Callable[..., None]:
        """Return a function that writes a response into a slot; `look` is called with the place first."""

        def write(_pages: object, at: int, *response: int) -> None:
            self._before(RING | STORE)
            look(at)
            layout.response.pack_into(self.raw, at, *response)

        return write
