"""Why a disk is not served, or not fully: the reasons, each with its rank and what clears it.

Must not know how a sentence came about.
"""

from __future__ import annotations

from enum import Enum, auto


class Cause(Enum):
    """What clears reasons."""

    KEYS = auto()  # the toolstack has written other keys
    RESUME = auto()  # an administrator wants the disk to be served again
    ANEW = auto()  # the frontend begins anew
    LET_GO = auto()  # the frontend has no rings, or none any more
    JOIN = auto()  # a worker is told to serve
    FRESH = auto()  # a worker is told to serve rings that no worker served before
    SERVED = auto()  # a worker serves
    ENDED = auto()  # the worker has ended
    REPLACED = auto()  # an administrator has put another chain in while there was no worker


class Reason(Enum):
    """The reasons: rank (the first that holds is shown), whether it keeps workers from starting, and what clears it."""

    CANNOT_OPEN = 1, True, (Cause.RESUME,)  # the chain could not be opened while the toolstack's script waited for it
    BAD_KEYS = 2, True, (Cause.KEYS,)  # the toolstack's keys are not valid
    UNDECIDED = 3, True, (Cause.REPLACED,)  # nobody knows which of two chains has the guest's data
    OTHER_FILE = 4, True, (Cause.RESUME,)  # a name leads to another file or medium than the one that was served
    OTHER_SIZE = 5, True, (Cause.RESUME, Cause.ANEW, Cause.LET_GO)  # not the size or sectors that the guest was told
    GIVEN_UP = 6, True, (Cause.RESUME, Cause.ANEW)  # too many workers have died one after the other
    BAD_RINGS = 7, False, (Cause.LET_GO,)  # the frontend's rings cannot be served
    FLUSH_FAILED = 8, False, (Cause.RESUME, Cause.FRESH)
    STORAGE = 9, False, (Cause.ENDED,)  # the storage does not answer
    KEY = 10, False, (Cause.ENDED,)  # a key is being made
    TROUBLE = 11, False, (Cause.ENDED,)  # the disk could not do something, and tries it again
    INTERRUPTED = 12, False, (Cause.RESUME, Cause.ANEW, Cause.SERVED)  # how the last worker ended; another one follows
    HALTED = 13, False, (Cause.JOIN,)  # which ring the frontend broke

    def __init__(self, rank: int, bars: bool, cleared_by: tuple[Cause, ...]) -> None:  # noqa: FBT001 - a column
        self.rank = rank
        self.bars = bars
        self.cleared_by = cleared_by


class Reasons:
    """The reasons that hold now, each with its sentence."""

    def __init__(self) -> None:
        self._said: dict[Reason, str] = {}

    def __getitem__(self, reason: Reason) -> str:
        """Return the sentence of a reason, empty if it does not hold."""
        return self._said.get(reason, "")

    def word(self) -> str:
        """Return the first reason as one word for programs, such as ``flush-failed``; empty if none holds."""
        return self.first.name.lower().replace("_", "-") if self.first else ""

    def say(self, reason: Reason, sentence: str) -> None:
        """Set the sentence of a reason; an empty one clears it."""
        self._said[reason] = sentence

    def clear(self, cause: Cause) -> None:
        """Clear all reasons that this cause clears."""
        for reason in Reason:
            if cause in reason.cleared_by:
                self._said.pop(reason, None)

    @property
    def first(self) -> Reason | None:
        """The reason of the highest rank that holds, None if none does."""
        return next((reason for reason in Reason if self[reason]), None)

    @property
    def bar(self) -> str:
        """The sentence of the first reason that keeps workers from starting, empty if none does."""
        return next((self[reason] for reason in Reason if self[reason] and reason.bars), "")
