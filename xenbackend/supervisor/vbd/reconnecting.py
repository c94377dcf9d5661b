"""Gives an opener to a worker that wants to connect to a server again, and limits how often it gets one.

Must not know why a connection was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbackend.protocol import messages

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

REST_S = 0.2  # between two openers for one worker, which itself says that it wants one

Then = Callable[[messages.Reply], None]
Ask = Callable[[messages.Question, Then], None]


class Reconnecting:
    """The reconnecting of one vbd's worker; `ask` asks the worker, `may` says whether it can have lost a connection."""

    def __init__(self, loop: Reactor, ask: Ask, may: Callable[[], bool]) -> None:
        self._loop = loop
        self._ask = ask
        self._may = may
        self._is_wanted = self._is_asked = False
        self._asked_at = float("-inf")
        self._timer = loop.timer(self._try)

    def stands(self, standing: messages.Standing) -> None:
        """Note whether the worker wants an opener now."""
        self._is_wanted = standing.wants_connections
        self._try()

    def stop(self) -> None:
        """Stop asking, because there is no worker."""
        self._is_wanted = False
        self._timer.set(None)

    def _try(self) -> None:
        if not self._is_wanted or self._is_asked:
            return
        now = self._loop.now()
        if now < self._asked_at + REST_S:
            self._timer.set(self._asked_at + REST_S)
            return
        if not self._may():
            return  # after an exchange of the chain another standing comes
        self._is_asked, self._asked_at = True, now
        self._ask(messages.Reconnect(), self._answered)

    def _answered(self, _: messages.Reply) -> None:
        self._is_asked = False
        self._timer.set(self._asked_at + REST_S)  # if it still wants one
