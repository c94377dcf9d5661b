"""The nodes of a xenstore: values, permissions, quotas and transactions. Pure: no socket, no watch.

Must not know a connection. A caller is a domain number; permissions and quotas do not apply to domain 0.

Nodes are never changed in place. A change makes new nodes from the root down to the changed one. So a transaction is
the root with which it began and a list of its changes, and keeping a whole tree costs nothing.

A refused operation raises OSError with the errno that a xenstored returns (`io/xs_wire.h`, "xsd_errors").
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

ABS_PATH_MAX = 3072  # io/xs_wire.h, XENSTORE_ABS_PATH_MAX
REL_PATH_MAX = 2048  # io/xs_wire.h, XENSTORE_REL_PATH_MAX

Permission = tuple[str, int]  # one of n, r, w, b; and a domain
_PATH = re.compile(r"/|(?:/[A-Za-z0-9_@-]+)+")
_PERMISSION = re.compile(r"([nrwb])([0-9]{1,5})")


@dataclass(frozen=True)
class Quota:
    """The limits of an unprivileged domain; the defaults are xenstored's."""

    nodes: int = 1000
    watches: int = 128
    value_size: int = 2048  # bytes
    transactions: int = 10
    transaction_nodes: int = 1024
    permissions: int = 5  # entries of one node


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `generation` changes whenever its value, its permissions or the set of its children changes."""

    value: bytes = b""
    permissions: tuple[Permission, ...] = (("n", 0),)
    children: Mapping[str, Node] = field(default_factory=dict)
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A node that was written, created or removed, with all nodes below it, before and after; None: no such node."""

    path: str
    before: Node | None
    after: Node | None


def resolve(domid: int, path: str) -> str:
    """Return the absolute path for a path that a domain uses. Raises: OSError EINVAL if it is not a path."""
    relative = not path.startswith("/")
    absolute = f"/local/domain/{domid}/{path}" if relative else path
    if _PATH.fullmatch(absolute) is None or len(path) > (REL_PATH_MAX if relative else ABS_PATH_MAX):
        raise OSError(errno.EINVAL, f"not a path: {path[:80]!r}")
    return absolute


def may(node: Node, domid: int, right: str) -> bool:
    """Return whether a domain has the right ``r`` or ``w`` on a node: as its owner, by an entry, or by the default."""
    if domid in (0, node.permissions[0][1]):
        return True
    everybody = node.permissions[0][0]
    letter = next((each for each, domain in node.permissions[1:] if domain == domid), everybody)
    return letter in (right, "b")


def walk(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    """Yield a node and all nodes below it, with their paths, parents first."""
    yield path, node
    for key, child in node.children.items():
        yield from walk(f"{path.rstrip('/')}/{key}", child)


class Tree:
    """The nodes outside of transactions. All paths are absolute (`resolve`)."""

    def __init__(self, root: Node | None = None, quota: Quota | None = None) -> None:
        self.root = root or Node()
        self.quota = quota or Quota()
        self.changes: list[Change] = []  # since `Registry.publish` last took them
        self._generation = 1

    def find(self, path: str) -> Node | None:
        """Return a node, None if it does not exist, without checking permissions."""
        node: Node | None = self.root
        for key in _keys(path):
            node = node.children.get(key) if node is not None else None
        return node

    def get(self, domid: int, path: str, right: str = "r") -> Node:
        """Return a node on which a domain has a right. Raises: OSError EACCES; ENOENT if the domain may know that."""
        self._touch(path)
        node = self.find(path)
        if not may(node or self._nearest(path), domid, right):
            raise OSError(errno.EACCES, path)
        if node is None:
            raise OSError(errno.ENOENT, path)
        return node

    def write(self, domid: int, path: str, value: bytes) -> None:
        """Set a value, and create the node and its parents if missing. Raises: OSError EACCES; ENOSPC for a quota."""
        if domid and len(value) > self.quota.value_size:
            raise OSError(errno.ENOSPC, path)
        try:
            node = self.get(domid, path, "w")
        except FileNotFoundError:
            self._create(domid, path, value)
        else:
            self._put(path, replace(node, value=value, generation=self._next()))
        self._log(lambda tree: tree.write(domid, path, value))

    def mkdir(self, domid: int, path: str) -> None:
        """Create a node and its parents, unless it exists. Raises: OSError EACCES; ENOSPC for a quota."""
        try:
            self.get(domid, path, "w")
        except FileNotFoundError:
            self._create(domid, path, b"")
            self._log(lambda tree: tree.mkdir(domid, path))

    def remove(self, domid: int, path: str) -> None:
        """Remove a node and all nodes below it; a missing one is no error.

        Raises: OSError EACCES; EINVAL for the root, ENOENT if even its parent is missing.
        """
        if path == "/":
            raise OSError(errno.EINVAL, path)
        parent, _, _ = path.rpartition("/")
        try:
            self.get(domid, path, "w")
        except FileNotFoundError:
            if self.find(parent or "/") is None:
                raise
            return
        self._touch(parent or "/")
        self._put(path, None)
        self._log(lambda tree: tree.remove(domid, path))

    def set_permissions(self, domid: int, path: str, texts: list[str]) -> None:
        """Set permissions such as ``n0 r5``. Only the owner may do this, and only domain 0 may change the owner.

        Raises: OSError EINVAL, EACCES, EPERM, ENOSPC for a quota.
        """
        permissions = tuple(_permission(text) for text in texts)
        node = self.get(domid, path, "w")
        if not permissions:
            raise OSError(errno.EINVAL, path)
        if domid and domid != node.permissions[0][1]:
            raise OSError(errno.EACCES, path)
        if domid and permissions[0][1] != domid:
            raise OSError(errno.EPERM, path)
        if domid and len(permissions) > self.quota.permissions:
            raise OSError(errno.ENOSPC, path)
        self._put(path, replace(node, permissions=permissions, generation=self._next()))
        self._log(lambda tree: tree.set_permissions(domid, path, texts))

    def begin(self, domid: int) -> Transaction:
        """Return a transaction that starts from the present tree."""
        return Transaction(self, domid)

    def commit(self, transaction: Transaction) -> None:
        """Apply a transaction's changes, all or nothing.

        Raises: OSError EAGAIN if a node that it read or changed has changed since it began, ENOSPC if a quota is
        exceeded by now.
        """
        for path, generation in transaction.touched.items():
            node = self.find(path)
            if generation != (node.generation if node else None):
                raise OSError(errno.EAGAIN, path)
        root, changes = self.root, list(self.changes)
        try:
            for action in transaction.actions:
                action(self)
        except OSError:
            self.root, self.changes = root, changes
            raise

    def _nearest(self, path: str) -> Node:
        """Return the closest existing ancestor: its permissions apply to a node that does not exist."""
        while (node := self.find(path)) is None:
            path = path.rpartition("/")[0] or "/"
        return node

    def _create(self, domid: int, path: str, value: bytes) -> None:
        """Create a node. New nodes inherit the permissions of their parent, but a guest owns the nodes it creates."""
        keys = _keys(path)
        missing = next(depth for depth in range(1, len(keys) + 1) if self.find("/" + "/".join(keys[:depth])) is None)
        parent_path = "/" + "/".join(keys[: missing - 1])
        self._touch(parent_path)
        parent = self._nearest(parent_path)
        if domid and self._owned(domid) + len(keys) - missing + 1 > self.quota.nodes:
            raise OSError(errno.ENOSPC, path)
        owner, *others = parent.permissions
        permissions = ((owner[0], domid or owner[1]), *others)
        for depth in range(missing, len(keys) + 1):
            generation = self._next()
            node = Node(value if depth == len(keys) else b"", permissions, {}, generation)
            self.root = self._grafted(self.root, keys[:depth], node) or Node()
        self.changes.append(Change(path, None, node))  # as in xenstored, parents created on the way fire no watch

    def _owned(self, domid: int) -> int:
        return sum(node.permissions[0][1] == domid for _, node in walk("/", self.root))

    def _put(self, path: str, node: Node | None) -> None:
        self.changes.append(Change(path, self.find(path), node))
        self.root = self._grafted(self.root, _keys(path), node) or Node()

    def _grafted(self, at: Node, keys: list[str], node: Node | None) -> Node | None:
        """Return a copy of the tree at `at` in which the node that `keys` name is replaced by `node`, or removed."""
        if not keys:
            return node
        key, *rest = keys
        below = self._grafted(at.children[key], rest, node) if rest else node
        children = {**at.children, key: below} if below else {k: v for k, v in at.children.items() if k != key}
        same_names = len(children) == len(at.children)
        return replace(at, children=children, generation=at.generation if same_names else self._next())

    def _next(self) -> int:
        self._generation += 1
        return self._generation

    def _touch(self, path: str) -> None:
        """Note that an operation depends on a node."""

    def _log(self, action: Callable[[Tree], None]) -> None:
        """Note a change, in a form that can be applied again."""


class Transaction(Tree):
    """A domain's private copy of the tree, until it is committed or dropped."""

    def __init__(self, live: Tree, domid: int) -> None:
        super().__init__(live.root, live.quota)
        self._base = Tree(live.root)
        self._domid = domid
        self.touched: dict[str, int | None] = {}  # by path: the generation at the beginning
        self.actions: list[Callable[[Tree], None]] = []

    def _touch(self, path: str) -> None:
        if path not in self.touched:
            if self._domid and len(self.touched) >= self.quota.transaction_nodes:
                raise OSError(errno.ENOSPC, path)
            node = self._base.find(path)
            self.touched[path] = node.generation if node else None

    def _log(self, action: Callable[[Tree], None]) -> None:
        self.actions.append(action)


def _keys(path: str) -> list[str]:
    return path.split("/")[1:] if path != "/" else []


def _permission(text: str) -> Permission:
    match = _PERMISSION.fullmatch(text)
    if match is None:
        raise OSError(errno.EINVAL, f"not a permission: {text[:20]!r}")
    return match[1], int(match[2])
