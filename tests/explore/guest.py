"""An honest guest on a ring: it makes a number of requests, takes the answers, and recognizes wrong ones.

Must not look at the journal. A request's number is its sector divided by `SECTORS`, and its place in the ring. Its id
is the lowest that is free, as with blkfront.
"""

from __future__ import annotations

from typing import NamedTuple

from xenbackend.blkif.abi import BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, X86_64
from xenbackend.blkif.request import encode_direct
from xenbackend.blkif.ring import FrontRing

SECTORS = 8  # of each request


class Violation(Exception):
    """Something happened that must not."""


class State(NamedTuple):
    """A guest's state. `waiting` has the number of the request that uses each id, or -1."""

    asked: int
    taken: int
    waiting: tuple[int, ...]


def operation_of(number: int) -> int:
    """Return the operation of a request: a read or a write."""
    return number & 1


def status_of(number: int) -> int:
    """Return the status that the disk gives a request. One request fails."""
    return BLKIF_RSP_ERROR if number == 2 else BLKIF_RSP_OKAY


class Guest:
    """The frontend's end."""

    def __init__(self, pages: memoryview, entries: int, requests: int, start: int) -> None:
        self.ring = FrontRing(pages, X86_64, entries, lambda: None)
        self.ring.start_at(start)
        self.start = start
        self.requests = requests
        self.state = State(0, 0, (-1,) * entries)

    def load(self, state: State) -> None:
        """Go to the state `state`."""
        self.state = state
        self.ring.produced = self.ring.pushed = self.start + state.asked
        self.ring.consumed = self.start + state.taken

    def moves(self) -> list[str]:
        """Return the moves that the guest can make next."""
        moves = []
        if self.state.asked < self.requests and self.ring.free():
            moves.append("ask")
        if self.ring.waiting():
            moves.append("take")
        return moves

    def move(self, which: str) -> None:
        """Make a request, or take an answer. Raises: Violation."""
        asked, taken, waiting = self.state
        if which == "ask":
            guest_id = waiting.index(-1)
            slot = encode_direct(X86_64, operation_of(asked), guest_id, asked * SECTORS, [(9, 0, SECTORS - 1)])
            self.ring.put(slot)
            self.ring.push()
            self.state = State(asked + 1, taken, _with(waiting, guest_id, asked))
        else:
            guest_id, operation, status, _ = self.ring.take()
            number = waiting[guest_id] if guest_id < len(waiting) else -1
            if number < 0:
                raise Violation("an answer to nobody: answered twice, or never written")
            if (operation, status) != (operation_of(number), status_of(number)):
                raise Violation("another request's answer")
            self.state = State(asked, taken + 1, _with(waiting, guest_id, -1))
            self.check_answer(number)

    def check_answer(self, number: int) -> None:
        """Check that an answer may be given. `Worker` in `worker.py` replaces this method."""

    def published(self) -> set[int]:
        """Return the guest's requests whose answers are published and not yet taken."""
        ring, found = self.ring, set()
        for place in range(ring.consumed, ring.consumed + min(ring.waiting(), ring.size)):
            start = ring._places[place % ring.size]
            guest_id = int.from_bytes(ring.pages[start : start + 8], "little")
            if guest_id < len(self.state.waiting):
                found.add(self.state.waiting[guest_id])
        return found


def _with(waiting: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*waiting[:place], number, *waiting[place + 1 :])
