"""One client of the rig's xenstored: messages in, messages out, as bytes. Pure: no socket, no thread.

Must not keep nodes (`rig/tree.py`) or wait for anything.

The wire format is described in `io/xs_wire.h`, the operations in docs/misc/xenstore.txt. Domain 0 sees everything; a
guest is subject to permissions and quotas, and gets events only for nodes that it may read.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.rig.tree import Change, Node, Transaction, Tree, may, resolve, walk

XENSTORE_PAYLOAD_MAX = 4096  # io/xs_wire.h
HEADER = struct.Struct("=IIII")  # io/xs_wire.h, "struct xsd_sockmsg": type, req_id, tx_id, len
(
    XS_DIRECTORY, XS_READ, XS_GET_PERMS, XS_WATCH, XS_UNWATCH, XS_TRANSACTION_START, XS_TRANSACTION_END, XS_INTRODUCE,
    XS_RELEASE, XS_GET_DOMAIN_PATH, XS_WRITE, XS_MKDIR, XS_RM, XS_SET_PERMS, XS_WATCH_EVENT, XS_ERROR,
    XS_IS_DOMAIN_INTRODUCED,
) = range(1, 18)  # fmt: skip  # io/xs_wire.h
XS_RESET_WATCHES, XS_DIRECTORY_PART = 21, 22  # io/xs_wire.h
INTRODUCE_DOMAIN, RELEASE_DOMAIN = "@introduceDomain", "@releaseDomain"  # docs/misc/xenstore.txt

Observer = Callable[[str, bytes | None], None]  # (path, new value, or None if it was removed)
_OK = b"OK\0"


class Registry:
    """Everything that sessions share: the tree, the existing domains, the watches."""

    def __init__(self, tree: Tree, observer: Observer | None = None) -> None:
        self.tree = tree
        self.domains = {0}
        self.sessions: list[Session] = []
        self._watches: dict[str, dict[Watch, None]] = {}  # by absolute path
        self._made = 0  # watches
        self._observer = observer

    def publish(self) -> None:
        """Tell watches and the observer about changes of the tree since the last call."""
        changes, self.tree.changes = self.tree.changes, []
        for change in changes:
            self._tell(change)
            if self._observer is not None:
                self._observer(change.path, change.after.value if change.after else None)

    def next_number(self) -> int:
        """Return the number of a new watch."""
        self._made += 1
        return self._made

    def watch(self, path: str, watch: Watch) -> None:
        """Give a session events for changes at a path and below it."""
        self._watches.setdefault(path, {})[watch] = None

    def unwatch(self, path: str, watch: Watch) -> None:
        """Undo a `watch`."""
        del self._watches[path][watch]
        if not self._watches[path]:
            del self._watches[path]

    def _tell(self, change: Change) -> None:
        """Tell the watches of the node, of the nodes above it, and of the nodes below that were removed with it.

        Watches on other nodes cost nothing: a host has as many watches as devices, and most changes concern only one.
        """
        node, path = change.after or change.before, change.path
        places = [(path, node)]
        while path != "/":
            path = path.rpartition("/")[0] or "/"
            places.append((path, node))
        heard = [(watch, change.path, node) for place, node in places for watch in self._watches.get(place, ())]
        if change.after is None and change.before is not None:
            below = [(place, node) for place, node in walk(change.path, change.before) if place != change.path]
            heard += [(watch, place, node) for place, node in below for watch in self._watches.get(place, ())]
        for watch, place, found in sorted(heard, key=lambda each: each[0].number):
            watch.session.tell(watch, place, found)

    def introduce(self, domid: int) -> None:
        """Create a domain with its directory, which it may read, and the node `domid` in it."""
        home = f"/local/domain/{domid}"
        self.domains.add(domid)
        self.tree.mkdir(0, home)
        self.tree.set_permissions(0, home, ["n0", f"r{domid}"])
        self.tree.write(0, f"{home}/domid", str(domid).encode())
        self.publish()
        self._fire(INTRODUCE_DOMAIN)

    def release(self, domid: int) -> None:
        """Remove a domain. Its nodes stay until a toolstack removes them, as on a real host."""
        self.domains.discard(domid)
        self._fire(RELEASE_DOMAIN)

    def _fire(self, name: str) -> None:
        for session in self.sessions:
            session.hear_special(name)


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """A watch of a session. Older watches get their events first."""

    session: Session
    number: int
    given: str
    token: str


class Session:
    """One connection of domain `domid`. Pass arriving bytes to `feed`; send the bytes in `outgoing`."""

    def __init__(self, registry: Registry, domid: int) -> None:
        self.domid = domid
        self.outgoing = bytearray()
        self._incoming = bytearray()
        self._registry = registry
        self._home = f"/local/domain/{domid}/"
        self._watches: dict[tuple[str, str], tuple[str, Watch]] = {}  # absolute path too, by path as given and token
        self._transactions: dict[int, Transaction] = {}
        self._begun = 0
        registry.sessions.append(self)

    def close(self) -> None:
        """Forget watches and transactions."""
        self._reset_watches(b"")
        self._registry.sessions.remove(self)

    def feed(self, data: bytes) -> None:
        """Serve the complete messages. Raises: ValueError if the client breaks the framing; hang up then."""
        self._incoming += data
        while len(self._incoming) >= HEADER.size:
            op, request, transaction, size = HEADER.unpack_from(self._incoming)
            if size > XENSTORE_PAYLOAD_MAX:
                raise ValueError(f"a payload of {size} bytes")
            end = HEADER.size + size
            if len(self._incoming) < end:
                return
            payload = bytes(self._incoming[HEADER.size : end])
            del self._incoming[:end]
            self._serve(op, request, transaction, payload)

    def tell(self, watch: Watch, path: str, node: Node | None) -> None:
        """Queue an event, unless the domain may not read the node."""
        if node is None or may(node, self.domid, "r"):
            told = path if watch.given.startswith("/") else path.removeprefix(self._home)
            self._send(XS_WATCH_EVENT, 0, 0, f"{told}\0{watch.token}\0".encode("latin-1"))

    def hear_special(self, name: str) -> None:
        """Queue an event for watches of a name such as ``@releaseDomain``; guests do not get such events."""
        for given, token in self._watches:
            if given == name and self.domid == 0:
                self._send(XS_WATCH_EVENT, 0, 0, f"{name}\0{token}\0".encode())

    def _send(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        self.outgoing += HEADER.pack(op, request, transaction, len(payload)) + payload

    def _serve(self, op: int, request: int, transaction: int, payload: bytes) -> None:
        try:
            reply = self._answer(op, transaction, payload)
            if len(reply) > XENSTORE_PAYLOAD_MAX:
                raise OSError(errno.E2BIG, "the reply is too long")
        except OSError as error:
            name = errno.errorcode.get(error.errno or errno.EIO, "EIO")
            op, reply = XS_ERROR, name.encode() + b"\0"
        self._registry.publish()
        self._send(op, request, transaction, reply)
        if op == XS_WATCH:  # a new watch fires once, after its reply
            path, token = _strings(payload, 2)
            self._send(XS_WATCH_EVENT, 0, 0, f"{path}\0{token}\0".encode("latin-1"))

    def _answer(self, op: int, transaction: int, payload: bytes) -> bytes:
        on_nodes = _ON_NODES.get(op)
        if on_nodes is not None:
            first, end, rest = payload.partition(b"\0")
            if not end:
                raise OSError(errno.EINVAL, "a path without its NUL")
            return on_nodes(self._tree(transaction), self.domid, resolve(self.domid, first.decode("latin-1")), rest)
        if op == XS_TRANSACTION_END:
            return self._end(transaction, payload)
        handler = _ON_SESSION.get(op)
        if handler is None:
            raise OSError(errno.ENOSYS, f"operation {op}")
        return handler(self, payload)

    def _tree(self, transaction: int) -> Tree:
        if not transaction:
            return self._registry.tree
        if transaction not in self._transactions:
            raise OSError(errno.ENOENT, f"transaction {transaction}")
        return self._transactions[transaction]

    def _begin(self, _: bytes) -> bytes:
        tree = self._registry.tree
        if self.domid and len(self._transactions) >= tree.quota.transactions:
            raise OSError(errno.ENOSPC, "transactions")
        self._begun += 1
        self._transactions[self._begun] = tree.begin(self.domid)
        return b"%d\0" % self._begun

    def _end(self, number: int, payload: bytes) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise OSError(errno.EINVAL, "neither T nor F")
        transaction = self._transactions.pop(number, None)
        if transaction is None:
            raise OSError(errno.ENOENT, f"transaction {number}")
        if payload == b"T\0":
            self._registry.tree.commit(transaction)
        return _OK

    def _watch(self, payload: bytes) -> bytes:
        given, token = _strings(payload, 2)
        if self.domid and len(self._watches) >= self._registry.tree.quota.watches:
            raise OSError(errno.E2BIG, "watches")
        if given.startswith("@"):
            if given not in (INTRODUCE_DOMAIN, RELEASE_DOMAIN):
                raise OSError(errno.EINVAL, given)
            absolute = given
        else:
            absolute = resolve(self.domid, given)
        if (given, token) in self._watches:
            raise OSError(errno.EEXIST, given)
        watch = Watch(self, self._registry.next_number(), given, token)
        self._watches[given, token] = absolute, watch
        self._registry.watch(absolute, watch)
        return _OK

    def _unwatch(self, payload: bytes) -> bytes:
        given, token = _strings(payload, 2)
        found = self._watches.pop((given, token), None)
        if found is None:
            raise OSError(errno.ENOENT, given)
        self._registry.unwatch(*found)
        return _OK

    def _reset_watches(self, _: bytes) -> bytes:
        for found in self._watches.values():
            self._registry.unwatch(*found)
        self._watches.clear()
        self._transactions.clear()
        return _OK

    def _introduce(self, payload: bytes) -> bytes:
        self._registry.introduce(self._domid(payload, privileged=True))
        return _OK

    def _release(self, payload: bytes) -> bytes:
        self._registry.release(self._domid(payload, privileged=True))
        return _OK

    def _domain_path(self, payload: bytes) -> bytes:
        return b"/local/domain/%d\0" % self._domid(payload)

    def _is_introduced(self, payload: bytes) -> bytes:
        return b"T\0" if self._domid(payload) in self._registry.domains else b"F\0"

    def _domid(self, payload: bytes, *, privileged: bool = False) -> int:
        text = payload.split(b"\0")[0]
        if privileged and self.domid:
            raise OSError(errno.EACCES, "for domain 0 only")
        if not text.isdigit() or len(text) > 5:
            raise OSError(errno.EINVAL, "not a domain number")
        return int(text)


def _strings(payload: bytes, count: int) -> list[str]:
    texts = payload.decode("latin-1").split("\0")[:-1]
    if len(texts) < count:
        raise OSError(errno.EINVAL, "too few strings")
    return texts[:count]


def _read(tree: Tree, domid: int, path: str, _: bytes) -> bytes:
    return tree.get(domid, path).value


def _names(tree: Tree, domid: int, path: str) -> bytes:
    return b"".join(key.encode() + b"\0" for key in tree.get(domid, path).children)


def _directory(tree: Tree, domid: int, path: str, _: bytes) -> bytes:
    return _names(tree, domid, path)


def _directory_part(tree: Tree, domid: int, path: str, rest: bytes) -> bytes:
    """Return ``generation|name|name|…``: whole names from a byte offset on; an empty name follows the last one."""
    offset = rest.rstrip(b"\0")
    if not offset.isdigit() or len(offset) > 9:
        raise OSError(errno.EINVAL, "not an offset")
    generation = b"%d\0" % tree.get(domid, path).generation
    names = _names(tree, domid, path)[int(offset) :] + b"\0"
    room = XENSTORE_PAYLOAD_MAX - len(generation)
    return generation + (names if len(names) <= room else names[: names.rindex(b"\0", 0, room) + 1])


def _write(tree: Tree, domid: int, path: str, value: bytes) -> bytes:
    tree.write(domid, path, value)
    return _OK


def _mkdir(tree: Tree, domid: int, path: str, _: bytes) -> bytes:
    tree.mkdir(domid, path)
    return _OK


def _remove(tree: Tree, domid: int, path: str, _: bytes) -> bytes:
    tree.remove(domid, path)
    return _OK


def _get_permissions(tree: Tree, domid: int, path: str, _: bytes) -> bytes:
    return b"".join(f"{letter}{domain}\0".encode() for letter, domain in tree.get(domid, path).permissions)


def _set_permissions(tree: Tree, domid: int, path: str, rest: bytes) -> bytes:
    tree.set_permissions(domid, path, rest.decode("latin-1").split("\0")[:-1])
    return _OK


_ON_NODES: dict[int, Callable[[Tree, int, str, bytes], bytes]] = {
    XS_READ: _read,
    XS_DIRECTORY: _directory,
    XS_DIRECTORY_PART: _directory_part,
    XS_WRITE: _write,
    XS_MKDIR: _mkdir,
    XS_RM: _remove,
    XS_GET_PERMS: _get_permissions,
    XS_SET_PERMS: _set_permissions,
}
_ON_SESSION: dict[int, Callable[[Session, bytes], bytes]] = {
    XS_TRANSACTION_START: Session._begin,  # noqa: SLF001 - the table is part of the class
    XS_WATCH: Session._watch,  # noqa: SLF001 - as above
    XS_UNWATCH: Session._unwatch,  # noqa: SLF001 - as above
    XS_RESET_WATCHES: Session._reset_watches,  # noqa: SLF001 - as above
    XS_INTRODUCE: Session._introduce,  # noqa: SLF001 - as above
    XS_RELEASE: Session._release,  # noqa: SLF001 - as above
    XS_GET_DOMAIN_PATH: Session._domain_path,  # noqa: SLF001 - as above
    XS_IS_DOMAIN_INTRODUCED: Session._is_introduced,  # noqa: SLF001 - as above
}
