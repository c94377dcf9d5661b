"""Everything about one vbd in xenstore: both ends' directories, our status, its error, facts about its domain.

Must not decide what follows from it, nor what is written.

The guest may read the backend's directory. Only we and the toolstack may read nodes, there and elsewhere, that may name
a file of the host: otherwise a guest whose image names parents would learn which files there are.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from xenbackend.blkif.features import IN_PLURAL
from xenbackend.blkif.handshake import XenbusState, parse_state
from xenbackend.errors import ConfigError, StoreError
from xenbackend.protocol.messages import Connect
from xenbackend.supervisor.vbd.events import Seen, Write
from xenbackend.supervisor.vbd.kept_files import key_of
from xenbackend.supervisor.vbd.negotiation import PRIVATE, has_moved
from xenbackend.supervisor.vbd.spec import frontend_path
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX, Nodes, private
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path, own_root, status_root
from xenbackend.supervisor.xenstore.store import Store

NOTES = "xenbackend-files"  # in our own directory: notes for a service to which nothing else was left
_CHAIN = "chain"
_OURS = "feature-persistent"  # a key that only a service of ours writes: a node that a toolstack makes anew has none
# What a toolstack writes with the node, and never again: a change of the medium writes only `params` and `type`.
_FIXED = frozenset({
    "frontend", "frontend-id", "script", "removable", "bootable", "dev", "device-type", "discard-enable",
    "specification",
})  # fmt: skip
_FEW = 3  # attempts of a transaction that a guest can have fail
_INCOMING = "--incoming"  # xl's: appended to the name until the guest runs here
_LEFT = "--migratedaway"  # xl's, too, once the guest runs elsewhere
_QUOTA = (errno.E2BIG, errno.ENOSPC)  # a watch is refused by the C xenstored, and by oxenstored: see `nodes.error_of`
_POLLED = "xenstore refuses to watch the guest's end of the disk, which is looked at once a second instead"
_RAISE = (
    "this domain has all the watches that xenstore's quota allows it; raise it in dom0 by "
    "`xenstore-control quota set watches N`, or by `quota-maxwatch` in oxenstored.conf"
)


class VbdNodes:
    """The nodes of one vbd; every method raises StoreError, unless it says otherwise.

    frontend      the frontend's directory once a look has found it, else empty
    is_unwatched  whether xenstore has refused to watch the frontend's state, which must then be looked at now and then
    token         of the watch on the frontend's state
    """

    def __init__(self, store: Store, path: VbdPath, warn: Callable[[str], None] = lambda _: None) -> None:
        """`warn` gets a sentence for the log."""
        self.frontend = ""
        self.is_unwatched = False
        self.token = f"frontend/{path}"
        self._store = store
        self._path = path
        self._warn = warn
        self._home = own_root(path.backend_domid)
        self._ours = private(path.backend_domid)
        self._notes_path = f"{self._home}/{NOTES}/{path}"
        self._status_path = f"{status_root(path.backend_domid)}/{path}"
        errors = f"{domain_path(path.backend_domid)}/error"
        self._error_path = f"{errors}/backend/{path}"
        # A driver domain may remove a directory that dom0 made for it, but not make it again. In dom0 all are our own.
        self._errors_home = errors if path.backend_domid else self._home
        self._theirs = XenbusState.UNKNOWN  # the frontend's state as last seen
        self._fixed: dict[str, str] = {}  # keys that were read already, and need not be read again
        self._status: dict[str, str] = {}  # as last written
        self._noted: list[str] | None = None  # as last written; None: unknown
        self._error: str | None = None  # as last written; None: unknown

    def keys(self) -> dict[str, str] | None:
        """Return the backend directory's keys, None when it is gone."""
        found = self._store.transact(self._read_keys)
        self._fixed = {key: found[key] for key in _FIXED & found.keys()}
        return found or None

    def _read_keys(self, nodes: Nodes) -> dict[str, str]:
        """Read the keys, except those that never change, as long as the node is the one that we have written to."""
        names = nodes.directory(self._path.backend)
        known = self._fixed if _OURS in names else {}
        fixed = {key: known[key] for key in names if key in known}
        return fixed | nodes.read_many(self._path.backend, [key for key in names if key not in fixed])

    def look(self, keys: dict[str, str] | None, agreed: Connect | None = None) -> Seen:
        """Look at the frontend, and return both ends; `keys` are the backend's directory's.

        If `agreed` is given, the frontend's rings are compared with it. If the frontend has just gone, the keys are
        read again: a toolstack changes both in one transaction.
        """
        was, theirs = self._theirs, self.theirs(keys or {})
        if theirs is XenbusState.UNKNOWN is not was:
            keys = self.keys()
            theirs = self.theirs(keys or {})
        self._theirs = theirs
        is_taken_away = theirs is XenbusState.UNKNOWN and keys is not None and keys.get("online") == "0"
        return Seen(
            keys,
            theirs,
            has_left=is_taken_away and self._guests_name().endswith(_LEFT),
            has_moved=agreed is not None and bool(self.frontend) and has_moved(self.read_frontend, agreed),
        )

    def theirs(self, keys: Mapping[str, str]) -> XenbusState:
        """Return the frontend's state, UNKNOWN if there is none that we may read.

        It is watched from now on, unless xenstore refuses that, and then each call tries again.
        """
        try:
            frontend = frontend_path(self._path, keys) or ""
        except ConfigError:
            frontend = ""  # the automaton reports it
        if frontend != self.frontend:
            self._unwatch()
            self.frontend = frontend
        if frontend:
            self._watch()
        return parse_state(self._store.read_if_allowed(f"{frontend}/state") if frontend else None)

    def read_frontend(self, key: str) -> str | None:
        """Return one of the frontend's keys, None if it has none that we may read."""
        return self._store.read_if_allowed(f"{self.frontend}/{key}")

    def write(self, write: Write) -> bool:
        """Set keys of the backend's directory, if it is still as `write` expects; return whether it was.

        If not, the toolstack has changed the node, made it anew, or removed it; a removed node is never made again.
        """
        backend = self._path.backend

        def body(nodes: Nodes) -> bool:
            if parse_state(nodes.read_optional(f"{backend}/state")) is not write.state:
                return False
            if write.params is not None and nodes.read_optional(f"{backend}/params") != write.params:
                return False
            if write.mark is not None and nodes.read_optional(f"{backend}/{write.mark}") is None:
                return False
            for key, value in write.keys.items():
                if value is None:
                    nodes.remove(f"{backend}/{key}")
                else:
                    nodes.write(f"{backend}/{key}", value)
                    if key in PRIVATE:
                        nodes.set_permissions(f"{backend}/{key}", self._ours)
            return True

        if write.offers_anew and not self._path.backend_domid:
            self._forget_rings()
        return self._store.transact(body)

    def _forget_rings(self) -> None:
        """Remove the guest's keys about the number of its rings and pages, which a former driver may have left.

        Linux writes these keys only if there are several rings or pages. So a kernel with fewer CPUs that is started
        after a crash, as by kdump, would be served with its predecessor's keys. A frontend that waits for InitWait has
        written none of its own yet.

        This has a transaction of its own: a guest that writes its state in a loop makes it fail, which must not keep
        our own state from being written. Such a guest keeps the keys that it has.
        """
        state = f"{self.frontend}/state"

        def body(nodes: Nodes) -> None:
            if parse_state(nodes.read_optional(state)) is XenbusState.INITIALISING:
                for key in IN_PLURAL:
                    nodes.remove(f"{self.frontend}/{key}")

        try:
            if self.frontend:
                self._store.transact(body, _FEW)
        except StoreError as error:
            if error.errno != errno.EAGAIN:
                raise

    def may_be_incoming(self, ours: XenbusState) -> bool:
        """Return whether `xl migrate` may be bringing the guest: until it runs here, its source may use the images.

        Only dom0 may read a guest's name. In a driver domain any guest may be one that is being migrated here, until
        our state `ours` shows that it has run here.
        """
        if self._path.backend_domid:
            return ours in (XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.INIT_WAIT)
        return self._guests_name().endswith(_INCOMING)

    def boots_by_device_model(self) -> bool:
        """Return whether a device model shows the guest an emulated disk until its own driver starts."""
        return self._of_domain(f"/libxl/{self._path.frontend_domid}/type") == "hvm"

    def show_error(self, sentence: str) -> None:
        """Show ``error/backend/…/error``, as Linux `xenbus_dev_error` does: errno and a sentence; empty removes it."""
        sentence = sentence[:SENTENCE_MAX]
        if sentence == self._error:
            return
        if sentence:
            if not self._error:
                self._store.mkdir(self._error_path)
                self._store.set_permissions(self._error_path, self._ours)
            self._store.write(f"{self._error_path}/error", f"{errno.EINVAL} {sentence}")
        elif self._error is not None or self._store.directory(self._error_path):
            self._store.prune(self._error_path, self._errors_home)
        self._error = sentence

    def show_status(self, values: Mapping[str, str]) -> None:
        """Show these values below ``xenbackend/…``; each is written only when it changes, since that wakes watchers."""
        changed = {key: value for key, value in values.items() if self._status.get(key) != value}
        self._store.write_many(self._status_path, changed)
        self._status = dict(values)

    def note_files(self, chain: str, identities: Mapping[str, str]) -> None:
        """Note the chain and the identities of its files, by name, for a service to which nothing else is left."""
        files = [f"{identity}|{key_of(name)}" for name, identity in identities.items()]
        noted = [chain, *files] if files else []
        if noted == self._noted:
            return

        def body(nodes: Nodes) -> None:
            nodes.remove(self._notes_path)
            nodes.mkdir(self._notes_path)
            nodes.set_permissions(self._notes_path, self._ours)  # nodes below inherit that: no guest reads file names
            for number, value in enumerate(noted):
                nodes.write(f"{self._notes_path}/{number or _CHAIN}", value)

        if noted or self._store.directory(self._notes_path):
            self._store.transact(body)
        self._noted = noted

    def noted_files(self, keys: Mapping[str, str], chain: str) -> dict[str, str]:
        """Return the identities of the files that an earlier service served the disk from, by `key_of` their names.

        Empty if the backend directory's `keys` are of a vbd that no service has seen yet, or if another chain than this
        one was noted.
        """
        if parse_state(keys.get("state")) in (XenbusState.UNKNOWN, XenbusState.INITIALISING):
            return {}
        noted = self._store.dictionary(self._notes_path)
        if noted.pop(_CHAIN, None) != chain:
            return {}
        return {key: identity for identity, _, key in (value.partition("|") for value in noted.values())}

    def doubt(self) -> None:
        """Have the next calls show everything anew, because xenstore was away. Raises nothing."""
        self._status, self._error, self._noted = {}, None, None

    def forget(self, *, goes_on: bool = False) -> None:
        """Stop watching, and remove what was shown, with the directories that were made for it.

        `goes_on`: the guest goes on, so the chain and its files stay noted for the next service.
        """
        self._unwatch()
        if not goes_on:
            self._store.prune(self._notes_path, self._home)
        self._store.prune(self._status_path, status_root(self._path.backend_domid))
        self._store.prune(self._error_path, self._errors_home)

    def _watch(self) -> None:
        """Watch the frontend's state, unless that is watched already: the store knows, and forgets a watch that failed.

        A watch that is refused is said once. Raises: StoreError, if xenstore is away.
        """
        try:
            self._store.watch(f"{self.frontend}/state", self.token)
        except StoreError as error:
            if not self._store.is_connected:
                raise
            if not self.is_unwatched:
                self._warn(f"{_POLLED}: {_RAISE if error.errno in _QUOTA else error}")
            self.is_unwatched = True
        else:
            self.is_unwatched = False

    def _unwatch(self) -> None:
        self.is_unwatched = False
        frontend, self.frontend = self.frontend, ""
        if frontend:
            self._store.unwatch(f"{frontend}/state", self.token)

    def _guests_name(self) -> str:
        return self._of_domain(f"{domain_path(self._path.frontend_domid)}/name")

    def _of_domain(self, path: str) -> str:
        try:
            return self._store.read_optional(path) or ""
        except StoreError:
            return ""  # the guest gets its disk all the same


def forget_notes(store: Store, domid: int) -> None:
    """Remove the notes about vbds that have gone while no service ran. Raises: StoreError."""
    home = own_root(domid)
    for kind in store.directory(f"{home}/{NOTES}"):
        for guest in store.directory(f"{home}/{NOTES}/{kind}"):
            for device in store.directory(f"{home}/{NOTES}/{kind}/{guest}"):
                if not store.directory(f"{domain_path(domid)}/backend/{kind}/{guest}/{device}"):
                    store.prune(f"{home}/{NOTES}/{kind}/{guest}/{device}", home)
