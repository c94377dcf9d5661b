"""The operations on xenstore's nodes, which are the same inside and outside a transaction.

Must not know a connection: the owner of one passes in functions that send requests.
"""

from __future__ import annotations

import errno as errno_module
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from xenbackend.errors import StoreError

Ask = Callable[[str, Sequence[str], bytes], bytes]  # (operation, NUL-terminated strings, raw tail) -> reply's payload
Request = tuple[str, bytes]  # a path, and what follows it
AskMany = Callable[[str, Sequence[Request]], list[bytes | StoreError]]  # payload or error of each
XENSTORE_PAYLOAD_MAX = 4096  # io/xs_wire.h
SENTENCE_MAX = 1000  # characters of a sentence for people: values end at 2048 bytes (quota)
_BY_QUOTA = "xenstore's quota for this domain allows no more"
_RESTARTS = 8  # tries to list a directory in parts while others change it


class Nodes:
    """The operations on nodes. `ask` sends an operation, named as in io/xs_wire.h, and returns the reply's payload.

    `ask_many` sends many requests of one operation before it waits for the first answer; None: there is no such way.

    Paths are absolute, or relative to our domain's own. Values are text, in which bytes that are not UTF-8 are lone
    surrogates, as in Python's file names; so nothing that a guest writes raises, and any file name comes through.
    By protocol they have at most 4096 bytes.
    Every method raises StoreError: with xenstore's errno, or EIO once the connection is lost.
    """

    def __init__(self, ask: Ask, ask_many: AskMany | None = None) -> None:
        self._ask = ask
        self._ask_many = ask_many or self._ask_each

    def read(self, path: str) -> str:
        """Return a node's value."""
        return decode(self._ask("READ", (path,), b""))

    def read_optional(self, path: str) -> str | None:
        """Return a node's value, or None when there is no such node."""
        try:
            return self.read(path)
        except StoreError as error:
            if error.errno != errno_module.ENOENT:
                raise
            return None

    def read_if_allowed(self, path: str) -> str | None:
        """Return a node's value, or None when there is none that our domain may read.

        A domain other than dom0 is not told which of the two it is, once the nodes above have gone as well.
        """
        try:
            return self.read_optional(path)
        except StoreError as error:
            if error.errno != errno_module.EACCES:
                raise
            return None

    def read_many(self, path: str, keys: Iterable[str]) -> dict[str, str]:
        """Return those of the named keys below `path` that exist. Use it for directories that a guest may fill."""
        return self._read_many(path, list(keys), (errno_module.ENOENT,))

    def read_many_if_allowed(self, path: str, keys: Iterable[str]) -> dict[str, str]:
        """Return those of the named keys below `path` that exist and that our domain may read."""
        return self._read_many(path, list(keys), (errno_module.ENOENT, errno_module.EACCES))

    def _read_many(self, path: str, keys: Sequence[str], left_out: Sequence[int]) -> dict[str, str]:
        answers = self._ask_many("READ", [(f"{path}/{key}", b"") for key in keys])
        found = {}
        for key, answer in zip(keys, answers, strict=True):
            if isinstance(answer, bytes):
                found[key] = decode(answer)
            elif answer.errno not in left_out:
                raise answer
        return found

    def _ask_each(self, operation: str, requests: Sequence[Request]) -> list[bytes | StoreError]:
        answers: list[bytes | StoreError] = []
        for path, tail in requests:
            try:
                answers.append(self._ask(operation, (path,), tail))
            except StoreError as error:
                answers.append(error)
        return answers

    def dictionary(self, path: str) -> dict[str, str]:
        """Return every direct child's value by key; empty when there is no such node."""
        return self.read_many(path, self.directory(path))

    def directory(self, path: str) -> list[str]:
        """Return the keys of a node's children; empty when there is no such node."""
        try:
            return strings(self._ask("DIRECTORY", (path,), b""))
        except StoreError as error:
            if error.errno == errno_module.E2BIG:
                return self._directory_in_parts(path)
            if error.errno != errno_module.ENOENT:
                raise
            return []

    def _directory_in_parts(self, path: str) -> list[str]:
        """List a directory that does not fit into one reply; start again if it changed between two parts."""
        for _ in range(_RESTARTS):
            names = self._parts_of_one_generation(path)
            if names is not None:
                return strings(names)
        raise StoreError(f"xenstore: directory {path}: it kept changing while it was read", errno_module.EAGAIN)

    def _parts_of_one_generation(self, path: str) -> bytes | None:
        """Return the whole list of names, None if it changed meanwhile.

        Source: docs/misc/xenstore.txt, DIRECTORY_PART: "<gencnt>|<child-leaf-name>|*"; an empty name ends the list.
        """
        names, first = b"", b""
        while not names.endswith(b"\0\0"):
            generation, _, part = self._ask("DIRECTORY_PART", (path, str(len(names))), b"").partition(b"\0")
            if generation != (first or generation) or not part:
                return None
            names, first = names + part, generation
        return names[:-1]

    def write(self, path: str, value: str) -> None:
        """Set a node's value. The node and those above it are made if they are missing."""
        self._ask("WRITE", (path,), encode(value))

    def write_many(self, path: str, values: Mapping[str, str]) -> None:
        """Set the named keys below `path`, each as `write` does."""
        requests = [(f"{path}/{key}", encode(value)) for key, value in values.items()]
        for answer in self._ask_many("WRITE", requests):
            if isinstance(answer, StoreError):
                raise answer

    def mkdir(self, path: str) -> None:
        """Make a node with an empty value. If it exists already, it is left alone."""
        self._ask("MKDIR", (path,), b"")

    def remove(self, path: str) -> None:
        """Remove a node and all below it. A missing node is no error."""
        try:
            self._ask("RM", (path,), b"")
        except StoreError as error:
            if error.errno != errno_module.ENOENT:
                raise

    def prune(self, path: str, home: str) -> None:
        """Remove a node, and then the directories above it that are left empty, below `home`.

        libxl__xs_path_cleanup does the same.
        """
        while path.startswith(f"{home}/"):
            self.remove(path)
            path = path.rpartition("/")[0]
            if self.directory(path):
                return

    def make(self, directory: str, keys: Mapping[str, str], permissions: Iterable[str]) -> None:
        """Make a directory with these keys, each with the given permissions."""
        permissions = list(permissions)
        self.mkdir(directory)
        self.set_permissions(directory, permissions)
        for key, value in keys.items():
            self.write(f"{directory}/{key}", value)
            self.set_permissions(f"{directory}/{key}", permissions)

    def get_permissions(self, path: str) -> list[str]:
        """Return permissions such as ``["n0", "r5"]``: owner with the rights of all others, then single domains."""
        return strings(self._ask("GET_PERMS", (path,), b""))

    def set_permissions(self, path: str, permissions: Iterable[str]) -> None:
        """Set permissions, in the form that `get_permissions` returns."""
        self._ask("SET_PERMS", (path, *permissions), b"")


def private(domid: int) -> list[str]:
    """Return the permissions of a node that only a domain and the toolstack, which has all rights, may use."""
    return [f"n{domid}"]


def error_of(what: str, word: bytes) -> StoreError:
    """Return the error for xenstored's answer in one word, such as ``ENOENT``; an unknown word becomes EIO.

    A domain's quota is ENOSPC in C xenstored, and a word of its own in oxenstored (process.ml).
    """
    name = word.rstrip(b"\0").decode("ascii", "replace").replace("EQUOTA", "ENOSPC")
    errno = getattr(errno_module, name, errno_module.EIO)
    return StoreError(f"{what}: {_BY_QUOTA if errno == errno_module.ENOSPC else os.strerror(errno)}", errno)


def encode(text: str) -> bytes:
    """Return the bytes of a path or value; file names that are not UTF-8 come through unchanged."""
    return text.encode("utf-8", "surrogateescape")


def decode(value: bytes) -> str:
    """Return the text of a path or value; never raises."""
    return value.decode("utf-8", "surrogateescape")


def strings(payload: bytes) -> list[str]:
    """Return the NUL-terminated strings of a payload."""
    return [decode(each) for each in payload.split(b"\0")[:-1]]


def payload(what: str, texts: Sequence[str], tail: bytes) -> bytes:
    """Return NUL-terminated strings and a raw tail as one payload. Raises: StoreError, if xenstore cannot carry it."""
    if any("\0" in each for each in texts):
        raise StoreError(f"{what!r}: a path, token or permission must not hold NUL", errno_module.EINVAL)
    whole = b"".join(encode(each) + b"\0" for each in texts) + tail
    if len(whole) > XENSTORE_PAYLOAD_MAX:
        raise StoreError(
            f"{what}: {len(whole)} bytes of path and value; xenstore carries at most {XENSTORE_PAYLOAD_MAX}",
            errno_module.E2BIG,
        )
    return whole
