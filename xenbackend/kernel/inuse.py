"""Why an image cannot be had: who uses it, by itself or by another face, in a sentence that says what to do.

Must not open an image for use, nor take a lock or a claim on it. Needs the rights of who opens images: it opens other
faces, and looks at other people's processes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from xenbackend.errors import DriverError, printable
from xenbackend.kernel import claims, locks, loops, qdisk
from xenbackend.kernel.locks import Access
from xenbackend.kernel.loops import Face

_WAY_OUT = "free it there first, or add share=on to the layer if both may write"
_UNKNOWN = "the host or a process"


class InUse(DriverError):
    """Somebody else uses an image; `user` says who, where that is known."""

    def __init__(self, sentence: str, path: str, user: str) -> None:
        super().__init__(sentence, path=path, errno=errno.EBUSY)
        self.user = user


@dataclass(frozen=True, slots=True)
class Naming:
    """How errors are worded; without names nothing is looked at but what is asked for."""

    with_names: bool = True

    def claimed(self, fd: int, path: str) -> InUse:
        """Return an error for a block device that somebody claims, of which `fd` is some descriptor."""
        user = self._users_of(fd)
        return InUse(f"{path} is in use by {user or _UNKNOWN}; {_WAY_OUT}", path, user)

    def locked(self, fd: int, path: str, access: Access) -> InUse:
        """Return an error for an image that is locked against this access, or used by another face."""
        for user in _served_by_qemu(fd, access):
            return InUse(f"{path} is in use by {user}; {_WAY_OUT}", path, user)
        with loops.faces(fd) as faces:
            for face in faces:
                if _is_used(face, access):
                    who = next(_served_by_qemu(face.fd, access), "") or self._users_of(face.fd) or _UNKNOWN
                    user = f"{who} as {printable(face.path)}"
                    return InUse(f"{path} is in use by {user}, which is the same image; {_WAY_OUT}", path, user)
        user = self._users_of(fd)
        sentence = f"{path} is locked by {user or 'another process'}; one writer at a time, or readers only"
        return InUse(sentence, path, user)

    def _users_of(self, fd: int) -> str:
        if not self.with_names:
            return ""
        from xenbackend.kernel.users import users_of  # late: most images are free

        return users_of(fd)


def is_used_by_another_face(fd: int, access: Access) -> bool:
    """Return whether an image, which is locked already, is used by another face in a way that does not go with this.

    So it is where Xen's QEMU serves it, which respects no lock.

    Of two who come by different faces at once, at least one sees the other, since each has locked its own before.
    Raises: OSError.
    """
    if any(_served_by_qemu(fd, access)):
        return True
    with loops.faces(fd) as faces:
        return any(_is_used(face, access) for face in faces)


def _is_used(face: Face, access: Access) -> bool:
    if not locks.is_free(face.fd, access) or any(_served_by_qemu(face.fd, access)):
        return True
    return face.is_device and not access.is_shared and claims.is_in_use(face.fd, by_writers=not access.writes)


def _served_by_qemu(fd: int, access: Access) -> Iterator[str]:
    """Yield who of Xen's QEMU uses an image in a way that does not go with this. Raises: OSError."""
    return iter(()) if access.is_shared else qdisk.users_of(fd, by_writers=not access.writes)
