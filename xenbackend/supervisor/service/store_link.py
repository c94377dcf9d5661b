"""The connection to xenstore in the loop: says when to look, and connects anew when it is lost.

Must not read a node. Disks are served even while there is no xenstore.

Events also arrive while another part of the service reads from xenstore, and that part may be the first to find out
that the connection is lost. So both are checked before the loop sleeps, which costs very little.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.errors import StoreError
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.xenstore.store import Store

_BACK_OFF_S = (0.1, 5.0)  # between tries to reconnect: at first, at most


class StoreLink:
    """One store in one loop.

    Args:
        store: the connection.
        loop: the loop that calls it.
        follow: looks at what has changed; called only while there is a connection. Raises: StoreError.
        has_work: returns whether there is anything to follow besides events.
        on_back: called when the connection is there again; nothing that was read before can be relied on.
    """

    def __init__(
        self,
        store: Store,
        loop: Reactor,
        *,
        follow: Callable[[], None],
        has_work: Callable[[], bool],
        on_back: Callable[[], None],
    ) -> None:
        self._store = store
        self._loop = loop
        self._follow = follow
        self._has_work = has_work
        self._on_back = on_back
        self._timer = loop.timer(self._reconnect)
        self._back_off_s = _BACK_OFF_S[0]
        self._log = get_logger("supervisor")
        loop.add(store.fileno(), self._try_to_follow)
        loop.before_sleep(self._catch_up)

    def close(self) -> None:
        """Stop looking; the connection stays."""
        self._timer.set(None)
        self._loop.remove_hook(self._catch_up)
        self._loop.remove(self._store.fileno())

    @property
    def _is_lost(self) -> bool:
        return self._timer.due is not None

    def _catch_up(self) -> bool:
        if self._is_lost or (self._store.is_connected and not self._store.has_events and not self._has_work()):
            return False
        self._try_to_follow()
        return not self._is_lost

    def _try_to_follow(self) -> None:
        if self._is_lost:
            return
        try:
            if not self._store.is_connected:
                raise StoreError(self._store.why_lost)
            self._follow()
        except StoreError as error:
            self._lose(error)

    def _lose(self, error: StoreError) -> None:
        reason = str(error)
        if self._store.is_connected:
            self._store.disconnect()  # nothing that was read before can be relied on: begin anew
        elif self._store.why_lost:
            reason = self._store.why_lost  # its first user was told why, which may have been a vbd
        if self._back_off_s == _BACK_OFF_S[0]:
            self._log.error("the connection to xenstore is lost; disks are still served", reason=reason)
        self._timer.set(self._loop.now() + self._back_off_s)
        self._back_off_s = min(2 * self._back_off_s, _BACK_OFF_S[1])

    def _reconnect(self) -> None:
        try:
            self._store.reconnect()
            self._on_back()
        except StoreError as error:
            self._lose(error)
            return
        self._log.info("xenstore is back")
        self._back_off_s = _BACK_OFF_S[0]
