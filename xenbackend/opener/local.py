"""Opens files in this process, for whoever may open them himself: image commands, `check`, tests.

Each name is looked up once while it is open, and what an image names is had by the rule for that (`parents`).

Must not be used by a worker, lock a file, nor decide what is done with it.
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
    """That an image was followed: `image` and `path` are the paths of both, `what` and `by` as `Found` has them."""

    image: str
    what: str
    path: str
    by: str


class LocalOpener:
    """Opens any file that an administrator names, and what images name by the rule; it holds what is open.

    It has the methods of `worker.opener.RemoteOpener`.

    Args:
        settings: returns the places of the settings; asked when an image names another file.
        trusts: follow images wherever they lead to, as an administrator has said.
        scratch: returns the directory of unnamed files. One is there for as long as it is open: it is not kept.

    `followed` are the images that led to other files, in their order, of one that trusts them.
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
        self._fds: dict[str, int] = {}  # O_PATH, by name
        self._uses: Counter[str] = Counter()  # how many are open by that name
        self._found: set[str] = set()  # names that images led to: they stay what they were

    def hold(self, path: str) -> None:
        """Have a name mean one file, that which an administrator means now, or that which was found.

        `release` it as often. Raises: DriverError; OSError, about the path.
        """
        if path == UNNAMED:
            self._have_unnamed()
        elif path not in self._found:
            self._keep(path, steps.hold(path))
        self._uses[path] += 1

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, Facts]:
        """Open a file that is held. Raises: OSError, about the path; EBUSY, where it `claims` what is in use."""
        held = self.descriptor(path)
        facts = self._facts(held, path)
        return steps.reopen(held, path, write=write, claims=claims), facts

    def is_used_beside(self, path: str, fd: int, access: Access) -> bool:  # noqa: ARG002 - for `RemoteOpener`
        """Return whether an image is used by another face. Raises: OSError."""
        return is_used_by_another_face(fd, access)

    def why_in_use(self, path: str, access: Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Return why an image that is held cannot be had, which somebody claims or has locked. Raises: OSError."""
        return steps.why_in_use(self.descriptor(path), path, access, is_claimed=is_claimed, with_names=with_names)

    def open_record(self, path: str) -> int:
        """Return a descriptor of a record file, which is made where it is not there. Raises: DriverError, OSError."""
        if path == UNNAMED:
            self._have_unnamed()
            return steps.reopen(self._fds[path], path, write=True)
        held = steps.hold_record(path, create=True)
        try:
            return steps.reopen(held, path, write=True)
        finally:
            os.close(held)

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:  # noqa: ARG002
        """Return a socket connected to a server. Nobody was before us here, and nobody comes after us.

        Raises: DriverError.
        """
        return connecting.connect(endpoint)

    def derive(self, source: str, how: Derivation, *, without_newline: bool) -> memoryview:
        """Return a key that is made of a passphrase, as `block.driver.Files.derive`. Raises: DriverError, OSError."""
        from xenbackend.opener.deriving import derive  # late: few images have a key

        return memoryview(derive(source, how, without_newline=without_newline))

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """Return what a client of a cluster has to know. Raises: DriverError, OSError."""
        from xenbackend.opener.cluster import read_settings  # late: few disks are in a cluster

        return read_settings(account)

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """As `block.driver.Files.read_certificates`."""
        from xenbackend.opener.certificates import read_certificates  # late, as above

        return read_certificates(directory)

    def look(self, path: str) -> Facts:
        """Return what a file is: the one that is open by this name, if one is. Raises: DriverError, OSError."""
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
        """Take note that what was opened by a name is closed: it may mean another file from now on."""
        self._uses[path] -= 1
        if self._uses[path] <= 0 and path in self._fds:
            os.close(self._fds.pop(path))
            self._found.discard(path)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find the file that an image names, as `block.driver.Lookup`. Raises: DriverError."""
        named = parents.Named(what, image, names, within)
        try:
            settings = self._settings()
        except ConfigError as error:
            raise DriverError(f"where parents may be cannot be known: {error}", path=image) from error
        allowed = parents.find(self.descriptor(image), named, settings, trusts=self._trusts)
        self._keep(allowed.path, allowed.fd)
        self._found.add(allowed.path)
        if self._trusts:
            self.followed.append(Followed(image, what, allowed.path, allowed.by))
        return Found(allowed.path, allowed.by)

    def mark_child(self, child: int, files: Mapping[str, str], former: Sequence[marks.Marked] = ()) -> bool:
        """Mark an image with an open one as its parent, and that one with the file that has its data.

        Args:
            child: a descriptor of the image.
            files: the parent's files by option (`block.options.files_of`), the image itself first.
            former: what stays in the mark beside it.

        Returns False where that cannot be. Raises: KernelError, OSError.
        """
        parent, *data = files.values()
        if not marks.mark_parents(child, [*former, self.describe(parent)]):
            return False
        return not data or marks.mark_files(self.descriptor(parent), [self.describe(each) for each in data])

    def describe(self, path: str) -> marks.Marked:
        """Return what a mark says of an open file. Raises: KernelError, OSError."""
        return marks.describe(self.descriptor(path), path)

    def descriptor(self, path: str) -> int:
        """Return an O_PATH descriptor of a file that was opened or found by this name, lent. Raises: KeyError."""
        return self._fds[path]

    def close(self) -> None:
        """Let go of all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._uses.clear()
        self._found.clear()

    def _have_unnamed(self) -> None:
        if UNNAMED not in self._fds:
            self._fds[UNNAMED] = steps.hold_unnamed(self._scratch())

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
    """Return what tells a file from any other, None where none is there. Raises: DriverError, OSError."""
    try:
        return LocalOpener().look(path).identity
    except FileNotFoundError:
        return None
