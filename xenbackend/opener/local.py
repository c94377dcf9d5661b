"""Opens files for the process that it is in: each name is looked up once, and what an image names by the rule for that.

Must not lock a file, nor decide what is done with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from xenbackend.block.driver import Found
from xenbackend.block.mapped.parents import PARENT
from xenbackend.errors import ConfigError, DriverError
from xenbackend.kernel import openat
from xenbackend.opener import marks, parents

Settings = Callable[[], Sequence[str]]


def parents_of_settings() -> Sequence[str]:
    """Return the places in which the settings file of this host allows parents. Raises: ConfigError."""
    from xenbackend import settings_file  # late: most images lead nowhere

    found = settings_file.read(settings_file.PATH, must_exist=False).get("parents", [])
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


@dataclass(frozen=True, slots=True)
class Followed:
    """That an image was followed: `image` and `path` are the paths of both, `what` and `by` as `Finder` has them."""

    image: str
    what: str
    path: str
    by: str


class Known(Protocol):
    """A file that a process had open, as `kernel.process.OpenFile`."""

    @property
    def path(self) -> str:
        """Where it is, without links."""

    @property
    def device(self) -> int:
        """Of the file system that is mounted there."""

    @property
    def inode(self) -> int:
        """Its number there."""


class LocalOpener:
    """Opens for image commands, and for a worker's process.

    Args:
        settings: returns the places of the settings; asked when an image names another file.
        in_service: files that a disk of the last release had open. Who is followed to one of them is marked with it.
        trusts: follow images wherever they lead to, as an administrator has said.

    `followed` are the images that led to other files, in their order, of one that trusts them.
    """

    def __init__(
        self, settings: Settings = parents_of_settings, in_service: Sequence[Known] = (), *, trusts: bool = False
    ) -> None:
        self._settings = settings
        self._in_service = in_service
        self._trusts = trusts
        self.followed: list[Followed] = []
        self._fds: dict[str, int] = {}  # O_PATH, by name
        self._uses: Counter[str] = Counter()  # how many are open by that name
        self._found: set[str] = set()  # names that images led to: they stay what they were

    def open(self, path: str, flags: int) -> int:
        """Open a file that an administrator names, or that was found; `release` it when it is closed again.

        Raises: OSError, about the path.
        """
        if path not in self._found:
            self._keep(path, openat.open_place(path))
        self._uses[path] += 1
        try:
            return openat.reopen(self._fds[path], flags)
        except OSError as error:
            self.release(path)
            error.filename = path
            raise

    def release(self, path: str) -> None:
        """Take note that what was opened by a name is closed."""
        self._uses[path] -= 1
        if self._uses[path] <= 0 and path in self._fds:
            os.close(self._fds.pop(path))
            self._found.discard(path)

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find the file that an image names, as `block.driver.Finder`. Raises: DriverError."""
        named = parents.Named(what, image, names, within)
        child = self.descriptor(image)
        try:
            settings = self._settings()
        except ConfigError as error:
            raise DriverError(f"where parents may be cannot be known: {error}", path=image) from error
        allowed = parents.find(child, named, settings, self._is_in_service, trusts=self._trusts)
        self._keep(allowed.path, allowed.fd)
        if allowed.by == parents.IN_SERVICE:
            marks.add(child, marks.PARENT if what == PARENT else marks.FILES, self.describe(allowed.path))
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

    def _is_in_service(self, fd: int) -> bool:
        return any(is_known(each, fd) for each in self._in_service)

    def _keep(self, path: str, fd: int) -> None:
        if path in self._fds:
            os.close(self._fds[path])
        self._fds[path] = fd


def is_known(known: Known, fd: int) -> bool:
    """Return whether a file is one that a process had open. Raises: OSError.

    The device of a file may be another one than that of the mount (btrfs): then the path decides.
    """
    status = os.fstat(fd)
    if known.inode != status.st_ino:
        return False
    return known.device == status.st_dev or known.path == openat.path_of(fd)
