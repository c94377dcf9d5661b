"""Why a disk is not served, or not as it should be: eleven sentences, and what takes each of them away.

Must not know how a sentence came about.
"""

from __future__ import annotations

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
    REPLACED = auto()  # an administrator has put another chain in while there was no worker


class Reason(Enum):
    """The sentences: rank (the first one that there is is shown), whether it bars a worker, and what takes it away."""

    CANNOT_OPEN = 1, True, (Cause.RESUME,)  # the chain, when the toolstack's script waited for it
    BAD_KEYS = 2, True, (Cause.KEYS,)  # the toolstack's
    UNDECIDED = 3, True, (Cause.REPLACED,)  # which of two chains has the guest's data
    OTHER_FILE = 4, True, (Cause.RESUME,)  # a name means another file or medium than the one that was served
    OTHER_SIZE = 5, True, (Cause.RESUME, Cause.ANEW, Cause.LET_GO)  # it is smaller than the guest was told
    GIVEN_UP = 6, True, (Cause.RESUME, Cause.ANEW)  # too many workers have died one after the other
    BAD_RINGS = 7, False, (Cause.LET_GO,)  # the frontend's, which cannot be served
    FLUSH_FAILED = 8, False, (Cause.RESUME, Cause.FRESH)
    STORAGE = 9, False, (Cause.ENDED,)  # it does not answer
    KEY = 10, False, (Cause.ENDED,)  # it is being made
    TROUBLE = 11, False, (Cause.ENDED,)  # what the disk could not do and tries again
    INTERRUPTED = 12, False, (Cause.RESUME, Cause.ANEW, Cause.SERVED)  # how the last worker ended; another one follows
    HALTED = 13, False, (Cause.JOIN,)  # which ring the frontend broke

    def __init__(self, rank: int, bars: bool, cleared_by: tuple[Cause, ...]) -> None:  # noqa: FBT001 - a column
        self.rank = rank
        self.bars = bars
        self.cleared_by = cleared_by


class Reasons:
    """Those that there are now."""

    def __init__(self) -> None:
        self._said: dict[Reason, str] = {}

    def __getitem__(self, reason: Reason) -> str:
        """Return a sentence, empty while there is no such reason."""
        return self._said.get(reason, "")

    def word(self) -> str:
        """Return one word for the first one, for programs: ``flush-failed``; empty where there is none."""
        return self.first.name.lower().replace("_", "-") if self.first else ""

    def say(self, reason: Reason, sentence: str) -> None:
        """Take note of a sentence; an empty one takes it away."""
        self._said[reason] = sentence

    def clear(self, cause: Cause) -> None:
        """Take away what this takes away."""
        for reason in Reason:
            if cause in reason.cleared_by:
                self._said.pop(reason, None)

    @property
    def first(self) -> Reason | None:
        """The one of the highest rank, None where there is none."""
        return next((reason for reason in Reason if self[reason]), None)

    @property
    def bar(self) -> str:
        """The first sentence because of which there is no worker, empty where there is none."""
        return next((self[reason] for reason in Reason if self[reason] and reason.bars), "")
