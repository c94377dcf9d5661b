"""Why a disk is not served, or not as it should be: eight sentences, and what takes each of them away.

Must not know how a sentence came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Cause(Enum):
    """What takes sentences away."""

    KEYS = auto()  # the toolstack has written other keys
    RESUME = auto()  # an administrator wants the disk served on
    ANEW = auto()  # the frontend begins anew
    LET_GO = auto()  # the frontend has no rings, or none any more
    JOIN = auto()  # a worker is told to serve
    FRESH = auto()  # it is told to serve rings that no worker served before
    SERVED = auto()  # a worker serves
    ENDED = auto()  # the worker has ended


class Reason(Enum):
    """The sentences, by rank: who looks is told the first one that there is."""

    CANNOT_OPEN = auto()  # the chain, when the toolstack's script waited for it
    BAD_KEYS = auto()  # the toolstack's
    GIVEN_UP = auto()  # too many workers have died one after the other
    BAD_RINGS = auto()  # the frontend's, which cannot be served
    FLUSH_FAILED = auto()
    TROUBLE = auto()  # what the disk could not do and tries again
    INTERRUPTED = auto()  # how the last worker ended, or why it could not serve; another one follows
    HALTED = auto()  # which ring the frontend broke


@dataclass(frozen=True, slots=True)
class Row:
    """What follows from one of them: `bars`: there is no worker meanwhile."""

    bars: bool
    cleared_by: frozenset[Cause]


_C = Cause
ROWS = {
    Reason.CANNOT_OPEN: Row(bars=True, cleared_by=frozenset({_C.RESUME})),
    Reason.BAD_KEYS: Row(bars=True, cleared_by=frozenset({_C.KEYS})),
    Reason.GIVEN_UP: Row(bars=True, cleared_by=frozenset({_C.RESUME, _C.ANEW})),
    Reason.BAD_RINGS: Row(bars=False, cleared_by=frozenset({_C.LET_GO})),
    Reason.FLUSH_FAILED: Row(bars=False, cleared_by=frozenset({_C.RESUME, _C.FRESH})),
    Reason.TROUBLE: Row(bars=False, cleared_by=frozenset({_C.ENDED})),
    Reason.INTERRUPTED: Row(bars=False, cleared_by=frozenset({_C.RESUME, _C.ANEW, _C.SERVED})),
    Reason.HALTED: Row(bars=False, cleared_by=frozenset({_C.JOIN})),
}


class Reasons:
    """Those that there are now."""

    def __init__(self) -> None:
        self._said: dict[Reason, str] = {}

    def __getitem__(self, reason: Reason) -> str:
        """Return a sentence, empty while there is no such reason."""
        return self._said.get(reason, "")

    def say(self, reason: Reason, sentence: str) -> None:
        """Take note of a sentence; an empty one takes it away."""
        self._said[reason] = sentence

    def clear(self, cause: Cause) -> None:
        """Take away what this takes away."""
        for reason, row in ROWS.items():
            if cause in row.cleared_by:
                self._said.pop(reason, None)

    @property
    def first(self) -> str:
        """The sentence of the highest rank, empty where there is none."""
        return next((self[reason] for reason in Reason if self[reason]), "")

    @property
    def bar(self) -> str:
        """The first sentence because of which there is no worker, empty where there is none."""
        return next((self[reason] for reason in Reason if self[reason] and ROWS[reason].bars), "")
