"""Opens files in this process, for programs that may open them themselves: image commands, `check`, tests.

Each name is looked up once while it is open, and files that images name are opened by the rule in `parents`.

Must not be used by a worker, lock a file, or decide what is done with it.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xenbackend.block.driver import Found
from xenbackend.block.files import UNNAMED
from xenbackend.block.keys import Derivation
from xenbackend.block.servers import Account, After, Endpoint
from xenbackend.errors import ConfigError, DriverError
from xenbackend.kernel.inuse import InUse, is_used_by_another_face
from xenbackend.kernel.locks import Access
from xenbackend.opener import connecting, marks, parents, steps
from xenbackend.protocol.opening import Facts

Settings = Callable[[], Sequence[str]]


def parents_of_settings() -> Sequence[str]:
    """Return the places in which the settings file of this host allows parents. Raises: ConfigError."""
    from xenbackend import settings_file  # late: most images lead nowhere

    found = settings_file.read(settings_file.PATH, must_exist=False).get("parents", [])
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def scratch_of_settings() -> str:
    """Return the directory in which this host's unnamed files are. Raises: ConfigError."""
    from xenbackend import settings_file  # late, as above

    found = settings_file.read(settings_file.PATH, must_exist=False).get("scratch", "")
    return found if isinstance(found, str) and found else settings_file.SCRATCH


@dataclass(frozen=True, slots=True)
class Followed:
    """An image that was followed: from `image` to `path`; `what` and `by` are as in `Found`."""

    image: str
    what: str
    path: str
    by: str


class LocalOpener:
    """Opens any file that an administrator names, and those that images name, by the rule; holds those that are open.

    It has the methods of `worker.opener.RemoteOpener`.

    Args:
        settings: returns the places in which the settings allow parents; called when an image names another file.
        trusts: follow images wherever they lead to, as an administrator has said.
        scratch: returns the directory of unnamed files. Such a file exists only while it is open.

    `followed`: if it trusts images, those that led to other files, in order.
    `missing`: record files that were not created, but would have been, in order.
    """

    def __init__(
        self,
        settings: Settings = parents_of_settings,
        *,
        trusts: bool = False,
        scratch: Callable[[], str] = scratch_of_settings,
    ) -> None:
        self._settings = settings
        self._scratch = scratch
        self._trusts = trusts
        self.followed: list[Followed] = []
        self.missing: list[str] = []
        self._fds: dict[str, int] = {}  # O_PATH, by name
        self._uses: Counter[str] = Counter()  # how often it is held, by name
        self._found: set[str] = set()  # names that images led to: they stay what they were
        self._stand_ins: set[str] = set()  # names of record files that are not created

    def hold(self, path: str) -> None:
        """Make a name mean one file: the one that it leads to now, or the one that `find` has found.

        `release` it as often as it is held. Raises: DriverError; OSError, about the path.
        """
        if path == UNNAMED:
            self._have_unnamed()
        elif path not in self._found | self._stand_ins:
            self._keep(path, steps.hold(path))
        self._uses[path] += 1

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, Facts]:
        """Open a file that is held. Raises: OSError, about the path; EBUSY, if it `claims` a device that is in use."""
        held = self.descriptor(path)
        facts = self._facts(held, path)
        return steps.reopen(held, path, write=write, claims=claims), facts

    def is_used_beside(self, path: str, fd: int, access: Access) -> bool:  # noqa: ARG002 - for `RemoteOpener`
        """Return whether an image is used by another face. Raises: OSError."""
        return is_used_by_another_face(fd, access)

    def why_in_use(self, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Return the error for an image that is held, which somebody else claims or has locked. Raises: OSError."""
        return steps.why_in_use(self.descriptor(path), path, access, is_claimed=is_claimed, with_names=with_names)

    def open_record(self, path: str, *, creates: bool = True) -> int:
        """Return a descriptor of a record file, which is made if it is not there. Raises: DriverError, OSError.

        If not `creates`, another file stands for such a file, as in `steps.hold_record_or_stand_in`.
        """
        if path == UNNAMED:
            self._have_unnamed()
            return steps.reopen(self._fds[path], path, write=True)
        held = self._create(path) if creates else self._hold_or_stand_in(path)
        try:
            return steps.reopen(held, path, write=True)
        finally:
            os.close(held)

    def is_stand_in(self, path: str) -> bool:
        """Return whether an unnamed file stands for a record file."""
        return path in self._stand_ins

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:  # noqa: ARG002 - the same
        """Return a socket connected to a server. Here there is no former connection, and no successor.

        Raises: DriverError.
        """
        return connecting.connect(endpoint)

    def derive(self, source: str, how: Derivation, *, without_newline: bool) -> memoryview:
        """Return a key that is made of a passphrase, as `block.driver.Files.derive`. Raises: DriverError, OSError."""
        from xenbackend.opener.deriving import derive  # late: few images have a key

        return memoryview(derive(source, how, without_newline=without_newline))

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Return the settings of a cluster's client. Raises: DriverError, OSError."""
        from xenbackend.opener.cluster import read_settings  # late: few disks are in a cluster

        return read_settings(account)

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """As `block.driver.Files.read_certificates`."""
        from xenbackend.opener.certificates import read_certificates  # late, as above

        return read_certificates(directory)

    def look(self, path: str) -> Facts:
        """Return the facts of a file: of the one that is held by this name, if any. Raises: DriverError, OSError."""
        if path == UNNAMED:
            self._have_unnamed()
        if path in self._fds:
            return self._facts(self._fds[path], path)
        fd = steps.hold(path)
        try:
            return steps.look(fd, path)
        finally:
            os.close(fd)

    def resolve(self, path: str) -> str:
        """Return the directory of a file with all links followed."""
        return steps.resolve(path)

    def release(self, path: str) -> None:
        """End one `hold` of a name; after the last one it may mean another file."""
        self._uses[path] -= 1
        if self._uses[path] <= 0 and path in self._fds and path not in self._stand_ins:
            os.close(self._fds.pop(path))
            self._found.discard(path)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find the file that an image names, as `block.driver.Lookup`. Raises: DriverError."""
        named = parents.Named(what, image, names, within)
        try:
            settings = self._settings()
        except ConfigError as error:
            raise DriverError(f"the directories where parents may be are not known: {error}", path=image) from error
        allowed = parents.find(self.descriptor(image), named, settings, trusts=self._trusts)
        self._keep(allowed.path, allowed.fd)
        self._found.add(allowed.path)
        if self._trusts:
            self.followed.append(Followed(image, what, allowed.path, allowed.by))
        return Found(allowed.path, allowed.by)

    def mark_child(self, child: int, files: Mapping[str, str], former: Sequence[marks.Marked] = ()) -> bool:
        """Mark an image with its parent, which is open, and that parent with the file that has its data.

        Args:
            child: a descriptor of the image.
            files: the parent's files by option (`block.options.files_of`), the image itself first.
            former: parents that stay in the image's mark.

        Returns False if they cannot be marked. Raises: KernelError, OSError.
        """
        parent, *data = files.values()
        if not marks.mark_parents(child, [*former, self.describe(parent)]):
            return False
        return not data or marks.mark_files(self.descriptor(parent), [self.describe(each) for each in data])

    def describe(self, path: str) -> marks.Marked:
        """Return an open file as a mark describes it. Raises: KernelError, OSError."""
        return marks.describe(self.descriptor(path), path)

    def descriptor(self, path: str) -> int:
        """Return an O_PATH descriptor of a file that was opened or found by this name, lent. Raises: KeyError."""
        return self._fds[path]

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._uses.clear()
        self._found.clear()
        self._stand_ins.clear()

    def _have_unnamed(self) -> None:
        if UNNAMED not in self._fds:
            self._fds[UNNAMED] = steps.hold_unnamed(self._scratch())

    def _create(self, path: str) -> int:
        """Return a descriptor of a record file, which is made if it is not there; no other one stands for it then."""
        if path in self._stand_ins:
            self._stand_ins.discard(path)
            os.close(self._fds.pop(path))
        return steps.hold_record(path, create=True)

    def _hold_or_stand_in(self, path: str) -> int:
        """Return a descriptor of a record file, or of the one that stands for it, which is made if necessary."""
        if path not in self._stand_ins:
            held, stands_in = steps.hold_record_or_stand_in(path)
            if not stands_in:
                return held
            if not os.path.lexists(path):
                self.missing.append(path)
            self._keep(path, held)
            self._stand_ins.add(path)
        return os.dup(self._fds[path])

    def _facts(self, fd: int, path: str) -> Facts:
        return steps.look(fd, self._scratch() if path == UNNAMED else path)

    def _keep(self, path: str, fd: int) -> None:
        if path in self._fds:
            os.close(self._fds[path])
        self._fds[path] = fd


def is_device(path: str) -> bool:
    """Return whether a file is a block device. Raises: DriverError, OSError."""
    return LocalOpener().look(path).is_device


def identity_of(path: str) -> str | None:
    """Return the identity of a file, or None if there is none. Raises: DriverError, OSError."""
    try:
        return LocalOpener().look(path).identity
    except FileNotFoundError:
        return None
