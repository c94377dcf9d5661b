"""A process that tries everything to break out of a worker, and reports what succeeded: without walls, everything.

Must not run outside of a mount namespace of its own (`confine_yourself`): without walls it is root, and mounts.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from xenbackend.block.driver import Env, Geometry, SimpleDriver
from xenbackend.block.request import Request

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_NEWNS = 0x20000
_REC_PRIVATE = 1 << 14 | 1 << 18
# x86_64, asm/unistd_64.h
_SENDMSG, _SETSOCKOPT = 46, 54
_MMAP, _MPROTECT, _EXECVE, _CHROOT, _SETHOSTNAME = 9, 10, 59, 161, 170
_SHMGET, _SHMCTL, _PTRACE, _CAPSET, _PIVOT_ROOT, _MOUNT, _ADD_KEY, _UNSHARE = 29, 31, 101, 126, 155, 165, 248, 272
_PERF_EVENT_OPEN, _SETNS, _PROCESS_VM_READV, _BPF, _EXECVEAT, _USERFAULTFD = 298, 308, 310, 321, 322, 323
_IO_URING_SETUP, _IO_URING_REGISTER, _PIDFD_OPEN, _PIDFD_GETFD = 425, 427, 434, 438
_IO_SETUP, _IO_DESTROY, _FALLOCATE = 206, 207, 285
_SYSLOG, _OPEN_BY_HANDLE, _CLONE3, _LANDLOCK = 103, 304, 435, 444


@dataclass(frozen=True)
class Surroundings:
    """What a canary tries to reach: a directory with a secret and a control socket; a neighbour, a page of it."""

    place: str
    neighbour: int
    page: int

    @property
    def secret(self) -> str:
        return f"{self.place}/secret"

    @property
    def control(self) -> str:
        return f"{self.place}/control.sock"

    @property
    def abstract(self) -> str:
        return f"\0{self.place}"


def confine_yourself() -> None:
    """Keep mounts to this process. One that is not root cannot, and needs not: it can mount nothing."""
    if os.geteuid() == 0 and (_libc.unshare(_NEWNS) or _libc.mount(None, b"/", None, _REC_PRIVATE, None)):
        raise OSError(ctypes.get_errno(), "no mount namespace of our own")


@contextmanager
def surroundings(place: Path) -> Iterator[Surroundings]:
    """Make what a canary tries to reach."""
    (place / "secret").write_text("secret")
    (place / "secret").chmod(0o600)
    (place / "empty").mkdir()
    near, far = os.pipe()
    page = ctypes.create_string_buffer(b"secret", 4096)
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as abstract:
        control.bind(str(place / "control.sock"))
        control.listen(64)
        abstract.bind(f"\0{place}")
        abstract.listen(64)
        neighbour = os.fork()
        if neighbour == 0:
            os.close(far)
            os.read(near, 1)
            os._exit(0)
        os.close(near)
        try:
            yield Surroundings(str(place), neighbour, ctypes.addressof(page))
        finally:
            os.close(far)
            os.waitpid(neighbour, 0)


def attempts(at: Surroundings) -> dict[str, Callable[[], object]]:
    """Return what to try, by name; each raises OSError if it is refused."""
    was_dumpable = _libc.prctl(3, 0, 0, 0, 0) == 1
    return {
        # files
        "read a secret": lambda: _closed(os.open(at.secret, os.O_RDONLY)),
        "write to another's file": lambda: _closed(os.open(at.secret, os.O_RDWR)),
        "make a file": lambda: _closed(os.open(f"{at.place}/made", os.O_RDWR | os.O_CREAT)),
        "list the root": lambda: _closed(os.open("/", os.O_RDONLY | os.O_DIRECTORY)),
        "see the host's files": lambda: Path("/etc/passwd").stat(),
        "change the owner of a file": lambda: os.chown(at.secret, 1, 1),
        "open by a handle": lambda: _call(
            _OPEN_BY_HANDLE, -100, struct.pack("Ii8x", 8, 1), 0, but={errno.EBADF, errno.ESTALE}
        ),
        "make a device": lambda: os.mknod(f"{at.place}/device", 0o20600, os.makedev(1, 3)),
        # processes
        "read a neighbour's memory by /proc": lambda: _closed(os.open(f"/proc/{at.neighbour}/mem", os.O_RDONLY)),
        "read a neighbour's environment": lambda: _closed(os.open(f"/proc/{at.neighbour}/environ", os.O_RDONLY)),
        "read a neighbour's memory": lambda: _read_memory(at),
        "trace a neighbour": lambda: _trace(at.neighbour),
        "signal a neighbour": lambda: os.kill(at.neighbour, 0),
        "see a neighbour": lambda: _see(at.neighbour),
        "hold a neighbour": lambda: _closed(_call(_PIDFD_OPEN, at.neighbour, 0)),
        "take a neighbour's descriptor": lambda: _take_descriptor(at.neighbour),
        "slow a neighbour down": lambda: os.setpriority(os.PRIO_PROCESS, at.neighbour, 1),
        "bind a neighbour to a CPU": lambda: os.sched_setaffinity(at.neighbour, {0}),
        "limit a neighbour": lambda: resource.prlimit(at.neighbour, resource.RLIMIT_CORE, (0, 0)),
        "fork": _fork,
        "have a thousand threads": _have_threads,
        "clone3": lambda: _call(_CLONE3, None, 0, but={errno.EINVAL}),
        "run a program": lambda: _run(lambda: _call(_EXECVE, b"/bin/true", _arguments(), None)),
        "run a program from memory": lambda: _run(_run_memory),
        # sockets
        "socket of IPv4": lambda: socket.socket(socket.AF_INET).close(),
        "socket of netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "raw socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "pair of sockets": lambda: [each.close() for each in socket.socketpair()],
        "connect to the control socket": lambda: _connect(at.control),
        "connect to an abstract socket": lambda: _connect(at.abstract),
        "see the network's devices": _devices,
        "send a descriptor": lambda: _call(_SENDMSG, -1, None, 0, but={errno.EBADF}),
        "have a socket's end take long": lambda: _call(
            _SETSOCKOPT, -1, socket.SOL_SOCKET, socket.SO_LINGER, None, 0, but={errno.EBADF}
        ),
        # what the kernel offers besides
        "mount": lambda: _call(_MOUNT, b"none", f"{at.place}/empty".encode(), b"tmpfs", 0, None),
        "change the root": lambda: _chroot(at),
        "namespace of mounts": lambda: _in_child(lambda: _call(_UNSHARE, _NEWNS)),
        "namespace of users": lambda: _in_child(lambda: _call(_UNSHARE, 0x10000000)),
        "enter a namespace": lambda: _call(_SETNS, -1, 0, but={errno.EBADF}),
        "name the host": lambda: _in_child(_name_the_host),
        "shared memory": lambda: _call(_SHMCTL, _call(_SHMGET, 0, 4096, 0o1600), 0, None),
        "reserve space for a file": lambda: _reserve(0),
        "reserve space behind a file's end": lambda: _reserve(1),  # KEEP_SIZE
        "make a context of Linux AIO": _make_aio_context,
        "make an io_uring": lambda: _closed(_call(_IO_URING_SETUP, 4, bytes(120))),
        "change an io_uring": lambda: _call(_IO_URING_REGISTER, -1, 0, None, 0, but={errno.EBADF, errno.EINVAL}),
        "keys": lambda: _call(_ADD_KEY, b"user", b"xenbackend-canary", b"x", 1, -2),
        "bpf": lambda: _call(_BPF, 0, struct.pack("IIII48x", 2, 4, 4, 1), 64),
        "userfaultfd": lambda: _closed(_call(_USERFAULTFD, 0)),
        "watch the CPU's events": lambda: _call(_PERF_EVENT_OPEN, None, 0, -1, -1, 0, but={errno.EFAULT}),
        "read the kernel's log": lambda: _call(_SYSLOG, 10, None, 0),
        "make a memory of its own": lambda: os.close(os.memfd_create("canary")),
        "make memory executable": lambda: _call(_MMAP, None, 4096, 7, 0x22, -1, 0),
        "ask for Landlock": lambda: _call(_LANDLOCK, None, 0, 1),
        # itself
        "become root": lambda: os.setresuid(0, 0, 0),
        "join a group": lambda: os.setgroups([0]),
        "let itself be dumped": lambda: _prctl(4, 1),
        "be dumped": lambda: _refuse_unless(was_dumpable),
        "have an environment": lambda: _refuse_unless(bool(os.environ)),
        "have other descriptors": lambda: _refuse_unless(bool(_others())),
    }


def try_all(at: Surroundings) -> list[str]:
    """Return the names of all that succeeded."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    succeeded = []
    for name, attempt in attempts(at).items():
        with suppress(OSError, ValueError):
            attempt()
            succeeded.append(name)
    return succeeded


def _call(*arguments: object, but: set[int] | None = None) -> int:
    """Make a system call; an errno in `but` means that it was allowed, and only its arguments were wrong.

    An int becomes a whole word: the last of six is passed on the stack, where the upper half of a C int is undefined.
    """
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    result = int(_libc.syscall(*words))
    code = ctypes.get_errno()
    if result < 0 and code not in (but or ()):
        raise OSError(code, os.strerror(code))
    return result


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _closed(fd: int) -> None:
    os.close(fd)


def _refuse_unless(is_so: bool) -> None:
    if not is_so:
        raise OSError(errno.EPERM, "no")


def _see(pid: int) -> None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise
    except PermissionError:  # it is there, unless the call itself was refused
        _refuse_unless(_is_let_in(lambda: os.kill(2**22 + 1, 0), ProcessLookupError))


def _is_let_in(attempt: Callable[[], object], error: type[OSError]) -> bool:
    try:
        attempt()
    except error:
        return True
    except OSError:
        return False
    return True


def _read_memory(at: Surroundings) -> None:
    into = ctypes.create_string_buffer(6)
    near = struct.pack("QQ", ctypes.addressof(into), 6)
    far = struct.pack("QQ", at.page, 6)
    _call(_PROCESS_VM_READV, at.neighbour, near, 1, far, 1, 0)
    _refuse_unless(into.raw == b"secret")


def _trace(pid: int) -> None:
    _call(_PTRACE, 0x4206, pid, None, None)  # PTRACE_SEIZE
    _call(_PTRACE, 0x4207, pid, None, None)  # PTRACE_INTERRUPT, so that we can let go
    os.waitpid(pid, 0x40000000)  # __WALL
    _call(_PTRACE, 17, pid, None, None)  # PTRACE_DETACH


def _take_descriptor(pid: int) -> None:
    holder = _call(_PIDFD_OPEN, pid, 0)
    try:
        _closed(_call(_PIDFD_GETFD, holder, 2, 0))
    finally:
        os.close(holder)


def _in_child(attempt: Callable[[], object]) -> None:
    """Try in a child what would change this process for good; if there can be no child, it is refused here, too."""
    try:
        child = os.fork()
    except OSError:
        attempt()
        return
    if child == 0:
        try:
            attempt()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _refuse_unless(os.waitpid(child, 0)[1] == 0)


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _have_threads() -> None:
    """Have them all at once, each with a small stack, and end them."""
    may_end = threading.Event()
    threads: list[threading.Thread] = []
    usual = threading.stack_size(1 << 16)
    try:
        while len(threads) < 1000:
            each = threading.Thread(target=may_end.wait)
            each.start()
            threads.append(each)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread") from error
    finally:
        may_end.set()
        for each in threads:
            each.join()
        threading.stack_size(usual)


def _run(program: Callable[[], object]) -> None:
    _in_child(program)


def _arguments() -> object:
    return (ctypes.c_char_p * 2)(b"true", None)


def _run_memory() -> None:
    content = Path("/bin/true").read_bytes()
    memory = os.memfd_create("program", 0)
    os.write(memory, content)
    _call(_EXECVEAT, memory, b"", _arguments(), None, 0x1000)


def _reserve(mode: int) -> None:
    memory = os.memfd_create("reserved", 0)
    try:
        _call(_FALLOCATE, memory, mode, 0, 4096)
    finally:
        os.close(memory)


def _make_aio_context() -> None:
    context = ctypes.c_ulong(0)
    _call(_IO_SETUP, 1, ctypes.byref(context))
    _call(_IO_DESTROY, context)


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as near:
        near.connect(path)


def _devices() -> None:
    with socket.socket(socket.AF_INET) as near:
        names = {name for _, name in socket.if_nameindex()}
        near.close()
    _refuse_unless(names != {"lo"})


def _chroot(at: Surroundings) -> None:
    def change() -> None:
        os.chroot(at.place)

    _in_child(change)


def _name_the_host() -> None:
    name = socket.gethostname().encode()
    _call(_SETHOSTNAME, name, len(name))


def _others() -> list[int]:
    """Return the descriptors that are open besides the one that tests give (a socket, number 3 or above)."""
    found = []
    for fd in range(3, 256):
        with suppress(OSError):
            os.fstat(fd)
            found.append(fd)
    return found[1:]


class Canary(SimpleDriver):
    """A driver that a worker opens like any other, and that tries to break out of it when told.

    Its verb ``escape PLACE NEIGHBOUR PAGE`` answers with the names of all that succeeded, as JSON.
    """

    name = "canary"

    def open(self, env: Env) -> Geometry:
        """Answer with a small disk."""
        return Geometry(1 << 20)

    def read(self, request: Request) -> None:
        """Read zeros."""
        for view in request.iov:
            view[:] = bytes(len(view))

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Try everything. A worker may have other descriptors, which tests look at from outside."""
        place, neighbour, page = arguments
        tried = try_all(Surroundings(place, int(neighbour), int(page)))
        return json.dumps([each for each in tried if each != "have other descriptors"]).encode()


class OfNetwork(Canary):
    """A canary that declares that it needs the network."""

    name = "canary-of-network"
    needs = frozenset({"network"})


class OfFiles(Canary):
    """A canary that declares that it needs to read files."""

    name = "canary-of-files"
    needs = frozenset({"files"})
