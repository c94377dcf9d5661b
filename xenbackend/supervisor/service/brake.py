"""A brake for watch events: a node that a guest writes too often is looked at now and then, and not at each event.

Must not know what a node means, nor lose the last of its changes.

Whoever has a watch pays for each event of it, and they all come over one connection: a guest that writes without end
costs the service a quarter of a CPU, and the events of all others wait behind its own. So a watch that brings more than
`BURST` events, beyond one each `REFILL_S`, is taken back for a while (`Store.mute`). xenstored fires a watch when it is
set again, so the node is looked at then, whatever happened meanwhile. A frontend's whole life, from the first state to
the last, is some six events.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from xenbackend.errors import StoreError
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.xenstore.store import Store

BURST = 128  # events of a watch
REFILL_S = 0.25
PAUSE_S = (1.0, 8.0)  # for which a watch is taken back: the first time, and at most

_MOST = 1000  # watches remembered before those are forgotten that are calm


class _Pace:
    """How often one watch brings events."""

    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._at = now
        self._pause_s = PAUSE_S[0]
        self._last_s = 0.0

    def count(self, events: int, now: float) -> float | None:
        """Count events; return for how long there were too many, None where there were not."""
        self._left = min(float(BURST), self._left + (now - self._at) / REFILL_S)
        self._at = now
        if self._left == BURST:
            self._pause_s = PAUSE_S[0]
        self._left -= events
        if self._left > 0:
            return None
        self._left = 0.0
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, PAUSE_S[1])
        self._last_s = pause_s
        return pause_s

    def last_s(self, now: float) -> float:
        """Return for how long it was taken back the last time; 0 for one that is calm, or was always."""
        return 0.0 if self.is_calm(now) else self._last_s

    def is_calm(self, now: float) -> bool:
        """Return whether it is as one that never brought an event."""
        return self._left + (now - self._at) / REFILL_S >= BURST


class Brake:
    """The brake for all watches of a store, but for some that no guest can make fire."""

    def __init__(
        self, loop: Reactor, store: Store, exempt: frozenset[str], on_begin: Callable[[str], None] = lambda _: None
    ) -> None:
        """`exempt` are the tokens of those; `on_begin` hears of each other one that was calm and is so no more."""
        self._loop = loop
        self._store = store
        self._exempt = exempt
        self._on_begin = on_begin
        self._paces: dict[str, _Pace] = {}  # by token
        self._due: dict[str, float] = {}  # when a watch is set again, by token
        self._most = _MOST
        self._timer = loop.timer(self._release)

    def look(self) -> None:
        """Count the events that came, and take the watches back that bring too many. Raises: StoreError."""
        now = self._loop.now()
        counts = {token: count for token, count in self._store.counts.items() if token not in self._exempt}
        self._store.counts.clear()
        braked = []
        for token, count in counts.items():
            pause_s = self._paces.setdefault(token, _Pace(now)).count(count, now)
            if pause_s is not None:
                if pause_s == PAUSE_S[0]:
                    self._on_begin(token)
                self._due[token] = now + pause_s
                braked.append(token)
        if braked:  # all at once: a store that is flooded takes its time for each answer
            self._timer.set(min(self._due.values()))
            self._store.mute(*braked)
        if len(self._paces) > self._most:
            self._forget_calm(now)

    def pause_s(self, token: str) -> float:
        """Return for how many seconds a watch that brings too many events is taken back each time; 0: it is calm."""
        pace = self._paces.get(token)
        return pace.last_s(self._loop.now()) if pace else 0.0

    def forget(self, token: str) -> None:
        """Begin anew with a watch: another vbd, whose guest has done nothing yet, has the same place."""
        self._paces.pop(token, None)

    def close(self) -> None:
        """Release nothing more."""
        self._timer.set(None)

    def _release(self) -> None:
        """Set the watches again whose time has come; where xenstore is away, that is done when it is back."""
        now = self._loop.now()
        released = [token for token, due in self._due.items() if due <= now]
        for token in released:
            del self._due[token]
        with suppress(StoreError):
            self._store.unmute(*released)
        self._timer.set(min(self._due.values(), default=None))

    def _forget_calm(self, now: float) -> None:
        self._paces = {token: pace for token, pace in self._paces.items() if not pace.is_calm(now)}
        self._most = max(_MOST, 2 * len(self._paces))
