"""A brake for watch events: a node that a guest writes too often is looked at now and then, and not at each event.

Must not know what a node means, nor lose the last of its changes.

Each event costs the service time, and all events come over one connection: a guest that writes without end costs a
quarter of a CPU, and the events of all others wait behind its own. So a watch that brings more than `BURST` events,
beyond one each `REFILL_S`, is removed for a while (`Store.mute`). xenstored fires a watch when it is set again, so the
node is then looked at, whatever happened meanwhile. In its whole life, from the first state to the last, a frontend
causes some six events.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.errors import StoreError
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.xenstore.store import Store

BURST = 128  # events of a watch
REFILL_S = 0.25
PAUSE_S = (1.0, 8.0)  # for which a watch is removed: the first time, and at most

_MOST = 1000  # watches remembered before the calm ones are forgotten


class _Pace:
    """How often one watch brings events."""

    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._at = now
        self._pause_s = PAUSE_S[0]
        self._last_s = 0.0

    def count(self, events: int, now: float) -> float | None:
        """Count events; return for how many seconds to remove the watch if there were too many, else None."""
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
        """Return for how many seconds the watch was removed the last time; 0 if it is calm, or always was."""
        return 0.0 if self.is_calm(now) else self._last_s

    def is_calm(self, now: float) -> bool:
        """Return whether the watch counts as one that never brought an event."""
        return self._left + (now - self._at) / REFILL_S >= BURST


class Brake:
    """The brake for all watches of a store, except for those that no guest can make fire."""

    def __init__(
        self,
        loop: Reactor,
        store: Store,
        exempt: frozenset[str],
        on_begin: Callable[[str], None] = lambda _: None,
        on_refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`exempt` are the tokens of those. `on_begin` gets the token of each other watch that stops being calm.

        `on_refused` gets the tokens of watches of which xenstored may have refused to set one again: their owners look.
        """
        self._loop = loop
        self._store = store
        self._exempt = exempt
        self._on_begin = on_begin
        self._on_refused = on_refused
        self._paces: dict[str, _Pace] = {}  # by token
        self._due: dict[str, float] = {}  # when a watch is set again, by token
        self._most = _MOST
        self._timer = loop.timer(self._release)

    def look(self) -> None:
        """Count the events that came, and remove the watches that bring too many. Raises: StoreError."""
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
        if braked:  # all at once: a flooded store is slow with each answer
            self._timer.set(min(self._due.values()))
            self._store.mute(*braked)
        if len(self._paces) > self._most:
            self._forget_calm(now)

    def pause_s(self, token: str) -> float:
        """Return for how many seconds a watch that brings too many events is removed each time; 0 if it is calm."""
        pace = self._paces.get(token)
        return pace.last_s(self._loop.now()) if pace else 0.0

    def forget(self, token: str) -> None:
        """Forget a watch's events: another vbd, whose guest has done nothing yet, has the same token."""
        self._paces.pop(token, None)

    def close(self) -> None:
        """Set no watch again from now on."""
        self._timer.set(None)

    def _release(self) -> None:
        """Set the watches again whose time has come. If xenstore is away, this is done when it is back."""
        now = self._loop.now()
        released = [token for token, due in self._due.items() if due <= now]
        for token in released:
            del self._due[token]
        try:
            self._store.unmute(*released)
        except StoreError:
            if self._store.is_connected:
                for token in released:
                    self._on_refused(token)
        self._timer.set(min(self._due.values(), default=None))

    def _forget_calm(self, now: float) -> None:
        self._paces = {token: pace for token, pace in self._paces.items() if not pace.is_calm(now)}
        self._most = max(_MOST, 2 * len(self._paces))
