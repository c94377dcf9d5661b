"""Work that many ask for at once and that is done once for all of them: a write of metadata, a flush.

Must not know what the work is.
"""

from __future__ import annotations

from collections.abc import Callable

Then = Callable[[int], None]  # gets 0 or a positive errno
Soon = Callable[[Callable[[], None]], None]


class Shared:
    """One piece of work, at most once under way; who asks meanwhile shares the next time.

    Args:
        begin: does the work, once, and calls what it is given with the status.
        soon: calls what it is given when nothing else is left to do, so that who asks at the same time shares.
    """

    def __init__(self, begin: Callable[[Then], None], soon: Soon) -> None:
        self._begin = begin
        self._soon = soon
        self._wanted: list[Then] = []
        self._sharing: list[Then] = []  # those for whom the work is under way

    @property
    def is_idle(self) -> bool:
        """Return whether nobody waits."""
        return not (self._wanted or self._sharing)

    def want(self, then: Then) -> None:
        """Call `then` when the work has been done once from its beginning, counted from now."""
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
