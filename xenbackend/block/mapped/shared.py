"""Work that is done once for all who ask for it at the same time: reading a table, writing metadata, a flush.

Must not know what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

Then = Callable[[int], None]  # gets 0 or a positive errno
Soon = Callable[[Callable[[], None]], None]
W = TypeVar("W")


class Shared:
    """One piece of work, under way at most once; those who ask meanwhile share the next run.

    Args:
        begin: does the work once, and calls its argument with the status.
        soon: calls its argument when nothing else is left to do, so that all who ask until then share a run.
    """

    def __init__(self, begin: Callable[[Then], None], soon: Soon) -> None:
        self._begin = begin
        self._soon = soon
        self._wanted: list[Then] = []
        self._sharing: list[Then] = []  # those who share the run that is under way

    @property
    def is_idle(self) -> bool:
        """Return whether nobody waits."""
        return not (self._wanted or self._sharing)

    def want(self, then: Then) -> None:
        """Call `then` when a run of the work that begins after this call has ended."""
        if self.is_idle:
            self._soon(self._start)
        self._wanted.append(then)

    def _start(self) -> None:
        self._sharing, self._wanted = self._wanted, []
        self._begin(self._done)

    def _done(self, status: int) -> None:
        sharing, self._sharing = self._sharing, []
        if self._wanted:
            self._soon(self._start)
        for then in sharing:
            then(status)


class SharedByNumber:
    """Numbered pieces of work, each of them a `Shared`: `begin` gets the number, too."""

    def __init__(self, begin: Callable[[int, Then], None], soon: Soon) -> None:
        self._begin = begin
        self._soon = soon
        self._works: dict[int, Shared] = {}

    def want(self, number: int, then: Then) -> None:
        """See `Shared`."""
        work = self._works.get(number)
        if work is None:
            work = self._works[number] = Shared(partial(self._begin, number), self._soon)
        work.want(then)

    def forget(self, number: int) -> None:
        """Free the memory of a piece of work, unless somebody waits for it."""
        if number in self._works and self._works[number].is_idle:
            del self._works[number]


class Once(Generic[W]):
    """Something that is fetched once for all who wait for it: the first one begins that, and all go on at its end.

    Args:
        go_on: called for each of those who waited, with that one and the results.
    """

    def __init__(self, go_on: Callable[..., None]) -> None:
        self._go_on = go_on
        self._waiting: dict[int, list[W]] = {}

    def want(self, number: int, who: W, begin: Callable[[Callable[..., None]], Any]) -> None:
        """Let `who` wait for thing number `number`. `begin` fetches it, and calls its argument with the results."""
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.append(who)
            return
        self._waiting[number] = [who]
        begin(partial(self._ended, number))

    def _ended(self, number: int, *results: Any) -> None:
        for who in self._waiting.pop(number):
            self._go_on(who, *results)
