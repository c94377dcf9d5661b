"""Marks: notes by which an administrator's command records at an image which files that image names.

A mark is an extended attribute of the image's file, beside its content. It says which file the image's parent is, so
that the image is opened with that parent and no other one. Only root can write or see an attribute of this kind
(xattr(7), "Trusted extended attributes"): the owner of an image cannot make a mark. A copy of the image has none.

A regular file is recognized by its identity (`kernel.identity`) without the number of its file system's device, which
may be another one after a reboot; the time of birth is compared instead. If a file system lacks handles or times of
birth, the device number counts. A block device is recognized by the name that the administrator wrote, since device
numbers are assigned anew at each boot.

Must not look at what is in an image, nor decide whether it may be followed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xenbackend.kernel import identity, openat

PARENT, FILES = "trusted.xenbackend.parent", "trusted.xenbackend.files"
_VERSION = 1
_NOT_HERE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Marked:
    """A file or device that a mark names.

    identity   of a regular file, as `kernel.identity` writes it; empty for a device
    born       the file's time of birth in nanoseconds since 1970; 0: not known
    device     path of a block device, as the administrator wrote it; empty for a file
    """

    identity: str = ""
    born: int = 0
    device: str = ""

    def is_of(self, fd: int) -> bool:
        """Return whether this is the file or device behind a descriptor, which must stay open meanwhile.

        Raises: KernelError, OSError.
        """
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if self.device or is_device:  # looking at a device would open it
            return bool(self.device) and is_device and is_same_device(self.device, fd)
        noted, found = identity.from_text(self.identity), identity.identify(fd)
        if isinstance(noted, identity.FileIdentity) and isinstance(found, identity.FileIdentity):
            born = identity.birth_of(fd)
            if noted.handle and found.handle and self.born and born:
                noted = replace(noted, device=found.device)
                return self.born == born and not identity.difference(noted, found)
        return not identity.difference(noted, found)


@dataclass(frozen=True, slots=True)
class Mark:
    """The marks of an image; `problem` is why they cannot be read.

    parents  its parent; two while the image is being given another one: it may name either
    files    other files that it names, which have its data
    """

    parents: list[Marked] = field(default_factory=list)
    files: list[Marked] = field(default_factory=list)
    problem: str = ""


def is_same_device(path: str, fd: int) -> bool:
    """Return whether a path leads to the block device behind a descriptor."""
    found = os.fstat(fd)
    try:
        named = openat.open_place(path)
    except OSError:
        return False
    try:
        status = os.fstat(named)
        return stat.S_ISBLK(status.st_mode) and stat.S_ISBLK(found.st_mode) and status.st_rdev == found.st_rdev
    finally:
        os.close(named)


def describe(fd: int, path: str) -> Marked:
    """Return the file behind a descriptor as a mark describes it; `path` is its name as the administrator wrote it.

    Raises: KernelError, OSError.
    """
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return Marked(device=os.path.abspath(path))  # noqa: PTH100 - pathlib would alter the name
    return Marked(identity.to_text(identity.identify(fd)), identity.birth_of(fd))


def read(fd: int) -> Mark:
    """Return the marks of an image; empty if it has none, or its file system has no such attributes."""
    try:
        return Mark(_read(fd, PARENT), _read(fd, FILES))
    except (OSError, ValueError, TypeError) as error:
        return Mark(problem=str(error))


def mark_parents(fd: int, parents: Sequence[Marked]) -> bool:
    """Mark an image with its parent, in the place of any former one; without parents, remove that mark.

    Returns False if its file system has no such attributes, or the caller may not write them. Raises: OSError.
    """
    return _write(fd, PARENT, list(parents))


def mark_files(fd: int, files: Sequence[Marked]) -> bool:
    """Mark an image with the other files that it names; as `mark_parents`."""
    return _write(fd, FILES, list(files))


def add(fd: int, name: str, file: Marked) -> bool:
    """Add a file to a mark, whose `name` is PARENT or FILES; return whether that could be done."""
    try:
        return _write(fd, name, [*_read(fd, name), file])
    except (OSError, ValueError, TypeError):
        return False


def sync(fd: int) -> None:
    """Make an image's mark durable. Raises: OSError."""
    opened = openat.reopen(fd, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def obstacle(fd: int) -> str:
    """Return why an image cannot be marked, or its mark not be seen, as the beginning of a sentence; else empty."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return "an image on a block device cannot be marked"
    if os.geteuid():
        return "only root can mark an image, or see its mark"
    try:
        os.getxattr(openat.link_to(fd), PARENT)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return "its file system cannot keep marks (trusted.* attributes)"
    return ""


def _read(fd: int, name: str) -> list[Marked]:
    try:
        data = os.getxattr(openat.link_to(fd), name)
    except OSError as error:
        if error.errno in (errno.ENODATA, *_NOT_HERE):
            return []
        raise
    found: Any = json.loads(data)
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise ValueError("its mark is from another version")
    return [_marked(each) for each in found.get("files", [])]


def _marked(value: dict[str, Any]) -> Marked:
    """Return a file of a mark. Raises: ValueError."""
    try:
        found = Marked(**value)
        if not found.device:
            identity.from_text(found.identity)
    except TypeError as error:
        raise ValueError("its mark cannot be read") from error
    return found


def _write(fd: int, name: str, files: list[Marked]) -> bool:
    path = openat.link_to(fd)
    try:
        if files:
            values = [{key: value for key in Marked.__slots__ if (value := getattr(each, key))} for each in files]
            os.setxattr(path, name, json.dumps({"version": _VERSION, "files": values}).encode())
        else:
            os.removexattr(path, name)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return True
        if error.errno in _NOT_HERE:
            return False
        raise
    return True
