"""Requests that the disk could not do: a policy keeps their errors from the guest, and has them tried again.

Must not answer a request or submit one: the engine does, when it is told.

A kept request stays INFLIGHT in the journal, so that a successor of this worker does it like any other.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable

from xenbackend.block.policy import Policy
from xenbackend.block.request import AWAY, CACHE_LOST, IMAGE_DAMAGED, Op, Request

_TOGETHER_S = 0.01  # requests that are due so soon after the first go with it

Call = Callable[[], object]


class Retries:
    """The requests that are kept, and when they are due.

    `tell` gets a sentence when a request pauses the disk, and an empty text once no such request is left.
    """

    def __init__(
        self,
        policy: Policy,
        now: Callable[[], float],
        call_later: Callable[[float, Call], None],
        tell: Callable[[str], None],
    ) -> None:
        self.policy = policy
        self.again: Call = self.due  # set by the owner: called when something is due
        self._now = now
        self._call_later = call_later
        self._tell = tell
        self._tries: dict[Request, int] = {}  # of each request that was ever kept and is not answered
        self._waiting: dict[Request, float] = {}  # by request: when it is due
        self._paused: set[Request] = set()
        self._final: set[Request] = set()
        self._rings_at = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def take(self, request: Request) -> bool:
        """Keep a request that has failed, if the policy says so; if not, return False: the caller answers it."""
        code = request.status
        action = self.policy.action(request.op, code)
        tries = self._tries.get(request, 0)
        if request in self._final or (action.tries is not None and tries >= action.tries):
            self.forget(request)
            return False
        self._tries[request] = tries + 1
        due = self._now() + action.every_s
        self._waiting[request] = due
        if action.pauses:
            if not self._paused:
                self._tell(_sentence(request, code))
            self._paused.add(request)
        self._ring_at(due)
        return True

    def refuse(self, requests: Iterable[Request]) -> None:
        """Never keep these requests: a bug ended them, which would only come again."""
        self._final.update(requests)

    def forget(self, request: Request) -> None:
        """Forget a request that has its answer, or whose place another one has taken."""
        self._final.discard(request)
        self._tries.pop(request, None)
        if request in self._paused:
            self._paused.discard(request)
            if not self._paused:
                self._tell("")

    def give_back(self) -> list[Request]:
        """Return all requests that wait, unchanged, to be tried again."""
        batch = [*self._waiting]
        self._waiting.clear()
        return batch

    def due(self) -> list[Request]:
        """Return the requests that have waited long enough, unchanged, to be tried again."""
        now = self._now() + _TOGETHER_S
        batch = [request for request, due in self._waiting.items() if due <= now]
        for request in batch:
            del self._waiting[request]
        return batch

    def give_up(self) -> list[Request]:
        """Return all requests that wait, with their errors, to be answered: the frontend is going away."""
        batch = self.give_back()
        self._tries.clear()
        self._paused.clear()
        return batch

    def _ring_at(self, due: float) -> None:
        if due < self._rings_at:
            self._rings_at = due
            self._call_later(due - self._now(), self._ring)

    def _ring(self) -> None:
        self._rings_at = math.inf
        self.again()
        now = self._now()  # overdue requests still wait, as the engine may not try them now
        self._ring_at(min((due for due in self._waiting.values() if due > now), default=math.inf))


def _sentence(request: Request, code: int) -> str:
    why = os.strerror(code)
    what = {Op.READ: "a read", Op.WRITE: "a write", Op.DISCARD: "a discard"}.get(Op(request.op), "a request")
    place = f"at byte {request.offset}"
    if code == IMAGE_DAMAGED:
        way_out = "shut the guest down, and repair the image with: xenbackend image check --repair"
        return (
            f"{what} {place} was not done, because it would destroy metadata of the damaged image; it waits: {way_out}"
        )
    if code == AWAY:
        return (
            f"{what} {place} waits, because the disk's server is away; it is sent again as soon as the server can be "
            "reached"
        )
    if code == CACHE_LOST:
        why = "its cache file gives errors, and nothing else holds what was written there"
        return (
            f"{what} {place} waits, because {why}; it is tried again every second: repair the storage of that file, "
            "and do not remove it"
        )
    way_out = "make space" if code in (errno.ENOSPC, errno.EDQUOT) else "repair the storage"
    return f"{what} {place} failed ({why}); the disk waits and tries again every second: {way_out}"
