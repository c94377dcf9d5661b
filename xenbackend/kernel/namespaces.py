"""One set of empty namespaces, made once and entered by any number of processes: no files, no network, no IPC objects.

Must not be entered by a process that still has to open or import anything by its name, or has more than one thread.

A short-lived child makes the set, because leaving a namespace takes more rights than entering one. After that, only our
descriptors keep it alive. Its root is an empty, read-only file system. Entering the set is far cheaper than making one:
a mount namespace starts as a copy of all mounts of the host, and a network namespace is made and destroyed under a lock
of the whole host.

The processes in the set share it, but cannot see each other through it, since none of them can create anything there.

Source: namespaces(7), setns(2), pivot_root(2) "pivot_root(".", ".")".
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from xenbackend.errors import KernelError

NETWORK = 0x40000000  # linux/sched.h, CLONE_NEWNET
FILES = 0x00020000  # CLONE_NEWNS
_IPC = 0x08000000  # CLONE_NEWIPC
_UTS = 0x04000000  # CLONE_NEWUTS
_PID = 0x20000000  # CLONE_NEWPID
# FILES comes last: a process that has entered that namespace cannot open anything any more.
_FOUND_AT = {NETWORK: "net", _IPC: "ipc", _UTS: "uts", FILES: "mnt"}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8  # linux/mount.h
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_MNT_DETACH = 2
_COVERED = b"/proc"  # a directory that every host has, as a mount point for the empty root until it is the root
_SYSCALLS = {"x86_64": 155, "aarch64": 41}  # pivot_root, for which the C library has no function

_libc = ctypes.CDLL(None, use_errno=True)


class EmptySet:
    """Descriptors of empty namespaces. Raises: KernelError if we may not make them."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        near, far = os.pipe()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(far)
            os.close(ready)
            _hold(near, told)
        os.close(near)
        os.close(told)
        try:
            failure = os.read(ready, 4)
            if failure:
                raise KernelError("make empty namespaces", int(failure))
            for kind, name in _FOUND_AT.items():
                self._fds[kind] = os.open(f"/proc/{child}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise KernelError("hold empty namespaces", error.errno or 0) from None
        finally:
            os.close(ready)
            os.close(far)
            os.waitpid(child, 0)

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors that keep the set alive."""
        return [*self._fds.values()]

    def enter(self, *, but: int = 0) -> None:
        """Enter all namespaces for good, except the kinds in `but` (NETWORK | FILES). Raises: KernelError."""
        for kind, fd in self._fds.items():
            if not kind & but and _libc.setns(fd, kind) < 0:
                raise KernelError(f"enter an empty {_FOUND_AT[kind]} namespace", ctypes.get_errno())

    def close(self) -> None:
        """Close the descriptors; processes that have entered the set stay in it."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def new_pid_namespace() -> None:
    """Make the next child the first process of a new PID namespace, where it sees no other one. Raises: KernelError.

    The calling process and its other children stay where they are.
    """
    _check(_libc.unshare(_PID), "make a namespace of processes")


def _hold(near: int, told: int) -> None:
    """In the child: make the namespaces, report it, and end when the parent has opened them."""
    try:
        _check(_libc.unshare(NETWORK | _IPC | _UTS | FILES), "make empty namespaces")
        _empty_the_root()
        os.close(told)
        os.read(near, 1)  # returns when the parent closes its end
    except (KernelError, OSError) as error:
        os.write(told, b"%d" % (error.errno or errno.EIO))
    finally:
        os._exit(0)


def _empty_the_root() -> None:
    """Replace the root of our own mount namespace with an empty one."""
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "keep mounts to ourselves")
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check(_libc.mount(b"none", _COVERED, b"tmpfs", flags, b"mode=555,size=4k,nr_inodes=1"), "mount an empty root")
    os.chdir(_COVERED)
    number = _SYSCALLS.get(os.uname().machine)
    if number is None:
        raise KernelError("change the root on this machine", errno.ENOSYS)
    _check(_libc.syscall(number, b".", b"."), "change the root")
    _check(_libc.umount2(b".", _MNT_DETACH), "leave the host's root")
    os.chdir("/")


def _check(result: int, operation: str) -> None:
    if result < 0:
        raise KernelError(operation, ctypes.get_errno())
