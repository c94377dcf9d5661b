"""A worker whose n-th call of the kernel fails: the table of calls, and the program that makes them fail.

Must not make calls of the rig fail: it stands for Xen, whose own refusals are rows of the table.

    CALLS      a call by name, how it is made to fail, and with which error
    EXEMPT     calls of a worker's code that are left alone, each with the reason
    Control    what the test and the worker share: which call fails, and whether it has

A call counts if it comes from our own code. All calls are counted together, so a test goes through n = 1, 2, 3, … until
nothing fails any more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_ARMED, _COUNTED, _TRIPPED, _IS_ON, _HAS_SLOW = range(5)  # words of the control page
_SITE = 64  # bytes: where the name of the call that failed begins
_OURS = ("xenbackend.worker.", "xenbackend.kernel.", "xenbackend.loop.", "xenbackend.block.", "xenbackend.journal")
_NOT_OURS = ("xenbackend.kernel.fixed",)  # the rig's substitute for a grant mapping

OS_CALLS = {
    "open": errno.EMFILE, "close": errno.EIO, "dup": errno.EMFILE, "eventfd": errno.EMFILE,
    "fdatasync": errno.EIO, "fstat": errno.EIO,
    "fsync": errno.EIO, "ftruncate": errno.EIO, "link": errno.EIO, "listdir": errno.EMFILE, "lseek": errno.EIO,
    "memfd_create": errno.EMFILE, "readlink": errno.EIO,
    "pread": errno.EIO, "preadv": errno.EIO, "pwrite": errno.EIO, "pwritev": errno.EIO, "set_blocking": errno.EIO,
    "set_inheritable": errno.EIO, "stat": errno.EIO, "statvfs": errno.EIO, "umask": errno.EIO,
    "writev": errno.ECONNRESET,
}  # fmt: skip
CALLS = {
    **{f"os.{name}": number for name, number in OS_CALLS.items()},
    "fcntl.fcntl": errno.EINVAL, "fcntl.flock": errno.ENOLCK, "fcntl.ioctl": errno.EIO, "mmap.mmap": errno.ENOMEM,
    "epoll.register": errno.ENOMEM, "epoll.modify": errno.ENOMEM,
    "aio 206": errno.EAGAIN, "aio 209": errno.EIO, "aio 208": errno.EINTR,  # io_setup, io_submit, io_getevents
    "uring 425": errno.ENOMEM, "uring 426": errno.EAGAIN,  # io_uring_setup, io_uring_enter
    "libc.fallocate": errno.EIO, "libc.statx": errno.EIO, "libc.mmap": errno.ENOMEM, "libc.munmap": errno.ENOMEM,
    "xen.open_grants": errno.EMFILE, "xen.open_events": errno.EMFILE, "xen.map": errno.ENOMEM, "xen.copy": errno.ENOMEM,
    "xen.unmap": errno.ENOMEM, "xen.bind": errno.ENOSPC, "xen.unbind": errno.EIO, "xen.pending": errno.EIO,
    "xen.unmask": errno.EIO,
}  # fmt: skip
SLOW = {"xen.unmask"}  # costs seconds: the ring is only found by the look once a second
EXEMPT = {
    "_libc.name_to_handle_at": "the opener's: kernel/test_identity.py",
    "os._exit": "ends the process",
    "os.eventfd_read": "of our own eventfd, which is readable: cannot fail",
    "os.eventfd_write": "of our own eventfd: fails only after 2**64 - 2 wake-ups that nobody has read",
    "os.cpu_count": "has an answer in any case: None at worst",
    "os.fsdecode": "no system call",
    "os.fsencode": "no system call",
    "os.major": "no system call",
    "os.makedev": "no system call",
    "os.minor": "no system call",
    "os.strerror": "no system call",
    "os.sysconf": "no system call",
    "os.getpid": "cannot fail",
    "os.getppid": "cannot fail",
    "os.getpriority": "of the service's own process",
    "os.getsid": "called for a process that may have gone; every error is taken for that",
    "os.setpriority": "every error is ignored: a worker is only slower",
    "os.kill": "the command line's, to itself: cannot fail",
    "os.fork": "the zygote's: worker/test_zygote.py",
    "os.pidfd_open": "the zygote's: worker/test_zygote.py",
    "os.pipe": "the zygote's: worker/test_zygote.py",
    "os.setsid": "the zygote's: worker/test_zygote.py",
    "os.waitpid": "the zygote's: worker/test_zygote.py",
    "os.read": "the zygote's pipe, and evtchn: kernel/test_evtchn.py",
    "os.urandom": "getrandom(2): cannot fail once the host has started",
    "os.utime": "of a check, which has no guest: cli/test_check.py",
    "os.write": "evtchn: kernel/test_evtchn.py; `xen.unmask` stands for it",
    "select.epoll": "made once, when the process begins, before it has a guest",
    "select.poll": "no system call: makes an object",
    "signal.pidfd_send_signal": "the service's",
    "signal.set_wakeup_fd": "the service's",
    "signal.signal": "the service's",
    "socket.recv_fds": "without its supervisor a worker ends: worker/test_main.py",
    "socket.send_fds": "without its supervisor a worker ends: worker/test_main.py",
    "socket.socket": "of the export: worker/test_export.py",
    "socket.socketpair": "the service's",
    "_libc.prctl": "the service's",
    **dict.fromkeys(
        (
            "_libc.capset", "_libc.mount", "_libc.setns", "_libc.syscall", "_libc.umount2", "_libc.unshare",
            "os.chdir", "os.setgroups", "os.setresgid", "os.setresuid", "os.uname",
        ),
        "of the walls, before it has a guest: walls/test_raising.py",
    ),
}  # fmt: skip


class Control:
    """A page that the test and the worker share."""

    def __init__(self, path: Path) -> None:
        """Open the page in the file `path`, which is made if there is none."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, mmap.PAGESIZE)
        self._page = memoryview(mmap.mmap(fd, mmap.PAGESIZE))
        self._words = self._page[:_SITE].cast("Q")
        os.close(fd)

    def arm(self, number: int) -> None:
        """Make the call with this number fail, counted from 1 from now on."""
        self._words[_TRIPPED] = self._words[_COUNTED] = 0
        self._words[_ARMED] = number
        self._words[_IS_ON] = 1

    def fail_slow_ones_too(self) -> None:
        """Count the calls of SLOW, too."""
        self._words[_HAS_SLOW] = 1

    def pause(self) -> None:
        """Make no call fail for now; `disarm` still returns what has failed."""
        self._words[_IS_ON] = 0

    def disarm(self) -> str:
        """Make no call fail any more; return which one has failed, empty if none has."""
        self._words[_IS_ON] = 0
        if not self._words[_TRIPPED]:
            return ""
        return bytes(self._page[_SITE : _SITE + 256]).partition(b"\0")[0].decode()

    def trips(self, site: str) -> bool:
        """Count a call, and return whether it has to fail."""
        words = self._words
        if not words[_IS_ON] or (not words[_HAS_SLOW] and site.partition(" ")[0] in SLOW):
            return False
        words[_COUNTED] += 1
        if words[_COUNTED] != words[_ARMED]:
            return False
        self._page[_SITE : _SITE + 256] = site.encode()[:255].ljust(256, b"\0")
        words[_TRIPPED] = 1
        return True


def _caller() -> str:
    """Return where in our own code a call comes from; empty if it comes from elsewhere."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "contextlib":  # an ExitStack calls it for us
        frame = frame.f_back
    if frame is None:
        return ""
    module = frame.f_globals.get("__name__", "")
    if not module.startswith(_OURS) or module in _NOT_OURS:
        return ""
    return f"{module}:{frame.f_lineno}"


class Failing:
    """Replaces calls by failing ones in this process."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def install(self) -> None:
        """Replace them all."""
        for name, number in OS_CALLS.items():
            setattr(os, name, self._python(f"os.{name}", getattr(os, name), number, is_done=name == "close"))
        for name in ("fcntl", "flock", "ioctl"):
            setattr(fcntl, name, self._python(f"fcntl.{name}", getattr(fcntl, name), CALLS[f"fcntl.{name}"]))
        mmap.mmap = self._python("mmap.mmap", mmap.mmap, errno.ENOMEM)
        self._replace_epoll()
        self._replace_system_calls()
        self._replace_xen()

    def _python(self, name: str, real: Callable[..., Any], number: int, *, is_done: bool = False) -> Any:
        """Return a call that raises; `is_done`: after doing it, as close(2) does."""
        control = self._control

        def call(*arguments: Any, **more: Any) -> Any:
            site = _caller()
            if site and control.trips(f"{name} {site}"):
                if is_done:
                    real(*arguments, **more)
                raise OSError(number, os.strerror(number))
            return real(*arguments, **more)

        return call

    def _replace_epoll(self) -> None:
        real, register, modify = select.epoll, self._python, self._python

        class Epoll:
            def __init__(self) -> None:
                self._real = real()
                self.register = register("epoll.register", self._real.register, errno.ENOMEM)
                self.modify = modify("epoll.modify", self._real.modify, errno.ENOMEM)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

        select.epoll = Epoll

    def _replace_system_calls(self) -> None:
        from xenbackend.kernel import aio, blockdev, memory, uring

        for module, kind in ((aio, "aio"), (uring, "uring")):
            module._syscall = self._counted(module._syscall, lambda number, kind=kind: f"{kind} {number}")
        blockdev._libc = _Library(blockdev._libc, fallocate=self._counted, statx=self._counted)
        memory._libc = _Library(memory._libc, mmap=self._counted, munmap=self._counted)

    def _counted(self, real: Callable[..., int], name_of: Callable[[int], str]) -> Callable[..., int]:
        """Return a call in the style of the C library, which fails by -1 and errno."""

        def call(*arguments: Any) -> int:
            name, site = name_of(arguments[0]), _caller()
            number = CALLS.get(name)
            if site and number is not None and self._control.trips(f"{name} {site}"):
                ctypes.set_errno(number)
                return ctypes.c_void_p(-1).value or -1 if name == "libc.mmap" else -1
            return real(*arguments)

        return call

    def _replace_xen(self) -> None:
        from xenbackend.errors import KernelError
        from xenbackend.rig import host

        control = self._control

        def refusing(name: str, real: Callable[..., Any], *, is_done: bool = False) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                site = _caller()
                if site and control.trips(f"{name} {site}"):
                    if is_done:
                        real(*arguments, **more)
                    raise KernelError(f"a call that fails ({name})", CALLS[name])
                return real(*arguments, **more)

            return call

        grants, events = host.RigGrants, host.RigEvents
        real = grants.map

        def mapped(*arguments: Any, **more: Any) -> Any:
            mapping = real(*arguments, **more)
            mapping.release = refusing("xen.unmap", mapping.release, is_done=True)
            return mapping

        grants.map = mapped
        for kind, methods in ((grants, ("map", "copy")), (events, ("bind", "unbind", "pending", "unmask"))):
            for method in methods:
                done = method == "unbind"
                setattr(kind, method, refusing(f"xen.{method}", getattr(kind, method), is_done=done))
        machine = type(host.open_host("/nowhere"))
        machine.open_grants = refusing("xen.open_grants", machine.open_grants)
        machine.open_events = refusing("xen.open_events", machine.open_events)


class _Library:
    """A C library with some of its functions replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self._real = real
        for name, replace in replaced.items():
            setattr(self, name, replace(getattr(real, name), lambda _, name=name: f"libc.{name}"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def main() -> int:
    """Be a worker whose calls fail: `python -m tests.failing_calls CONTROL --socket N`."""
    # All of them now: no import must be among the calls that are counted.
    from xenbackend.worker import channel, connection, direct, env, export, image, io_queue, leaf, main  # noqa: F401

    Failing(Control(Path(sys.argv[1]))).install()
    return main.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
