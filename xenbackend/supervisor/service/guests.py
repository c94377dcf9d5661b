"""The names of guests, read over a connection of its own, so that a silent xenstored does not hold up the service.

Must not be asked for anything that a disk depends on: it may return no name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import TypeVar

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.store import Store

ANSWER_S = 0.5
FIND_S = 2.0  # for all names, when a guest is looked for by its name
REST_S = 10.0  # after xenstored has not answered
_AT_ONCE = 16  # names that the store asks for before it waits for the first, so that they wait for ANSWER_S only once
_DOMAINS = "/local/domain"
T = TypeVar("T")


class Guests:
    """The names of domains."""

    def __init__(self, address: str, clock: Callable[[], float]) -> None:
        """Ask xenstored at this address, once a name is wanted."""
        self._address = address
        self._clock = clock
        self._store: Store | None = None
        self._rests_until = float("-inf")

    def names_of(self, domids: Iterable[int]) -> dict[int, str]:
        """Return the names of these domains' guests, as far as xenstored answers at once."""
        until = self._clock() + ANSWER_S
        names: dict[int, str] = {}
        wanted = list(domids)
        with closing(self):
            for first in range(0, len(wanted), _AT_ONCE):
                paths = {f"{domid}/name": domid for domid in wanted[first : first + _AT_ONCE]}
                try:
                    found = self._ask(partial(Store.read_many_if_allowed, path=_DOMAINS, keys=paths))
                except StoreError:
                    break
                names |= {paths[path]: guest for path, guest in found.items()}
                if self._clock() > until:
                    break
        return names

    def one_by_one(self) -> Callable[[int], str | None]:
        """Return a function that returns a domain's name, None if our domain may not know it; it works for FIND_S.

        It raises StoreError if xenstored does not answer, or after that time. Call `close` when done.
        """
        until = self._clock() + FIND_S

        def name_of(domid: int) -> str | None:
            if self._clock() > until:
                raise self._silence()
            return self._ask(lambda store: store.read_if_allowed(f"{_DOMAINS}/{domid}/name"))

        return name_of

    def close(self) -> None:
        """Close the connection, until the next name is wanted."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _ask(self, ask: Callable[[Store], T]) -> T:
        if self._clock() < self._rests_until:
            raise self._silence()
        try:
            return ask(self._connected())
        except StoreError:
            if self._store is None or not self._store.is_connected:  # else it has answered with an error
                self._rests_until = self._clock() + REST_S
                self.close()
            raise

    def _connected(self) -> Store:
        if self._store is None:
            self._store = Store(self._address, timeout_s=ANSWER_S)
        return self._store

    def _silence(self) -> StoreError:
        return StoreError(f"xenstore at {self._address} does not tell the names of guests; write a domain's number")
