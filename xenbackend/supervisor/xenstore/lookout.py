"""What stands in xenstore of one vbd: its backend directory, and its frontend's state with the watch on it.

Must not decide what follows from it, nor write anything but the chain's name.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenbackend.blkif.handshake import XenbusState, parse_state
from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.spec import frontend_path
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store


class Lookout:
    """Looks at one vbd's nodes; `frontend` is the frontend's directory once a look has found it, else empty."""

    def __init__(self, store: Store, path: VbdPath) -> None:
        self.frontend = ""
        self.token = f"frontend/{path}"  # of the watch on the frontend's state
        self._store = store
        self._path = path

    def keys(self) -> dict[str, str] | None:
        """Return the backend directory's keys, None when it is gone. Raises: StoreError."""
        return self._store.transact(lambda nodes: nodes.dictionary(self._path.backend)) or None

    def theirs(self, keys: Mapping[str, str]) -> XenbusState:
        """Return the frontend's state, UNKNOWN while there is none that we may look at. Raises: StoreError."""
        try:
            frontend = frontend_path(self._path, keys) or ""
        except ConfigError:
            frontend = ""  # the automaton says so
        if frontend != self.frontend:
            self.forget()
            self.frontend = frontend
            if frontend:
                self._store.watch(f"{frontend}/state", self.token)
        return parse_state(self._store.read_optional(f"{frontend}/state") if frontend else None)

    def rename_chain(self, former: str, chain: str) -> None:
        """Let ``params`` name another chain, unless the toolstack has made the vbd anew or wants a third one.

        Raises: StoreError.
        """

        def body(nodes: Nodes) -> None:
            place = f"{self._path.backend}/params"
            is_new = parse_state(nodes.read_optional(f"{self._path.backend}/state")) is XenbusState.INITIALISING
            if nodes.read_optional(place) == former and not is_new:
                nodes.write(place, chain)

        self._store.transact(body)

    def read_frontend(self, key: str) -> str | None:
        """Return one of the frontend's keys, None where it has none. Raises: StoreError."""
        return self._store.read_optional(f"{self.frontend}/{key}")

    def forget(self) -> None:
        """Watch no more. Raises: StoreError."""
        frontend, self.frontend = self.frontend, ""
        if frontend:
            self._store.unwatch(f"{frontend}/state", self.token)
