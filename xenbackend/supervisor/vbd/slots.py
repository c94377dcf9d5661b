"""Descriptors of one kind that a vbd keeps, each in a slot: the keeper has it, and the notes have a text about it.

Must not know what the texts say. A slot is noted before it is kept; the next service drops one that is not noted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import count


class Slots:
    """The slots whose names begin with one letter, such as ``f0``.

    Args:
        letter: that letter.
        noted: returns the notes' texts, by slot.
        note: replaces those texts. Raises: ConfigError, if they are too long.
        keep: has the keeper keep a slot's descriptor.
        forget: has the keeper forget a slot's descriptor.
    """

    def __init__(
        self,
        letter: str,
        noted: Callable[[], Mapping[str, str]],
        note: Callable[[dict[str, str]], None],
        keep: Callable[[str, int], None],
        forget: Callable[[str], None],
    ) -> None:
        self.noted = noted
        self.note = note
        self._letter = letter
        self._keep = keep
        self._forget = forget
        self._fds: dict[str, int] = {}

    def __contains__(self, slot: str) -> bool:
        return slot in self._fds

    def __getitem__(self, slot: str) -> int:
        """Return a slot's descriptor, which stays ours."""
        return self._fds[slot]

    def descriptors(self) -> dict[str, int]:
        """Return all descriptors by slot; they stay ours."""
        return dict(self._fds)

    def find(self, slot: str, fd: int) -> None:
        """Take over a slot's descriptor from an earlier service."""
        self._fds[slot] = fd

    def free(self) -> str:
        """Return the name of a slot that is used neither in the notes nor here."""
        taken = self.noted().keys() | self._fds.keys()
        return next(slot for number in count() if (slot := f"{self._letter}{number}") not in taken)

    def put(self, slot: str, fd: int) -> None:
        """Put a descriptor, ours from now on, into a slot in place of the former one, and have it kept."""
        self.drop(slot)
        self._fds[slot] = fd
        self._keep(slot, fd)

    def drop(self, slot: str) -> None:
        """Close a slot's descriptor, if there is one, and have the keeper forget it."""
        fd = self._fds.pop(slot, -1)
        if fd >= 0:
            os.close(fd)
            self._forget(slot)

    def drop_unnoted(self) -> None:
        """Drop the descriptors whose slots are not in the notes any more."""
        for slot in self._fds.keys() - self.noted().keys():
            self.drop(slot)

    def leave(self) -> None:
        """Close our descriptors, and leave the keeper's to the next service."""
        while self._fds:
            os.close(self._fds.popitem()[1])
