"""Explains why an image is not available: who uses it, directly or through another face, and what to do about it.

Must not open an image for use, nor take a lock or a claim on it. It needs the rights of a process that opens images,
since it opens other faces and looks at processes of other users.
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
    """Somebody else uses an image; `user` says who, empty if that is not known."""

    def __init__(self, sentence: str, path: str, user: str) -> None:
        super().__init__(sentence, path=path, errno=errno.EBUSY)
        self.user = user


@dataclass(frozen=True, slots=True)
class Naming:
    """Words the errors. If `with_names` is false, other processes and devices are not searched for the user."""

    with_names: bool = True

    def claimed(self, fd: int, path: str) -> InUse:
        """Return an error for a block device that somebody has claimed; `fd` is any descriptor of it."""
        user = self._users_of(fd)
        return InUse(f"{path} is in use by {user or _UNKNOWN}; {_WAY_OUT}", path, user)

    def locked(self, fd: int, path: str, access: Access) -> InUse:
        """Return an error for an image that is locked against this access, or used through another face."""
        for user in _served_by_qemu(fd, access):
            return InUse(f"{path} is in use by {user}; {_WAY_OUT}", path, user)
        with loops.faces(fd) as faces:
            for face in faces:
                if _is_used(face, access):
                    who = next(_served_by_qemu(face.fd, access), "") or self._users_of(face.fd, face) or _UNKNOWN
                    user = f"{who} as {printable(face.path)}"
                    same = ", which is the same image" if face.is_whole else ", which has some of the same data"
                    return InUse(f"{path} is in use by {user}{same}; {_WAY_OUT}", path, user)
        user = self._users_of(fd)
        sentence = f"{path} is locked by {user or 'another process'}; one writer at a time, or readers only"
        return InUse(sentence, path, user)

    def _users_of(self, fd: int, face: Face | None = None) -> str:
        if not self.with_names:
            return ""
        from xenbackend.kernel.users import users_of  # late: most images are free

        return users_of(fd, by_claim=face is None or not face.shares_claim)


def is_used_by_another_face(fd: int, access: Access) -> bool:
    """Return whether an image is used through another face, or by Xen's QEMU, in a way that conflicts with `access`.

    The caller has locked and claimed the image already. So if two processes come through different faces at once, at
    least one sees the other. Xen's QEMU respects no lock, so its descriptors are looked at. Raises: OSError.
    """
    if any(_served_by_qemu(fd, access)):
        return True
    with loops.faces(fd) as faces:
        return any(_is_used(face, access) for face in faces)


def _is_used(face: Face, access: Access) -> bool:
    if not locks.is_free(face.fd, access) or any(_served_by_qemu(face.fd, access)):
        return True
    if not face.is_device or face.shares_claim:
        return False
    return not access.is_shared and claims.is_in_use(face.fd, by_writers=not access.writes)


def _served_by_qemu(fd: int, access: Access) -> Iterator[str]:
    """Yield the processes of Xen's QEMU that use an image in a way that conflicts with `access`. Raises: OSError."""
    return iter(()) if access.is_shared else qdisk.users_of(fd, by_writers=not access.writes)
