"""A file system whose server stops answering, or answers as told: FUSE's own protocol, on /dev/fuse.

Must not be used unless `IS_POSSIBLE`. It is mounted in a mount namespace of the calling thread, which the processes
that it starts share, so that nothing is left when they have ended.

A process that waits for a request which the server has not read yet can be killed (`stop`). One that waits for a
request which the server has read and does not answer cannot be ended even by SIGKILL, as with an NFS server that has
gone (`hold`).

Sources: linux/fuse.h, version 7.31; fs/fuse/dev.c, request_wait_answer, for what can be killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEVICE = "/dev/fuse"
NOTHING = "nothing"
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 1, 2, 3, 4, 14, 15, 16, 17, 18, 20
INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 26, 27, 28, 29, 34, 36, 38, 42
_NO_ANSWER = (FORGET, BATCH_FORGET, INTERRUPT, DESTROY)
_IN, _OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
_ATTR = struct.Struct("=6Q10I")
_INIT = struct.Struct("=IIIIHHIIHHI28x")
_ROOT, _MOST = 1, 1 << 17
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 0x40000, 2
_libc = ctypes.CDLL(None, use_errno=True)

IS_POSSIBLE = os.geteuid() == 0 and Path(DEVICE).exists()


class Served:
    """The server's process as the test sees it; its files are in the directory `top`."""

    def __init__(self, top: Path, files: dict[str, int]) -> None:
        """Mount the file system. `files` are the sizes of files by name, which hold zeros at first."""
        self.top = top
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device = os.open(DEVICE, os.O_RDWR)
        words = [f"{name}={size}" for name, size in files.items()]
        command = [sys.executable, "-m", "tests.fuse", str(device), str(far.fileno()), *words]
        self._process = subprocess.Popen(command, pass_fds=[device, far.fileno()])
        far.close()
        self._socket = near
        options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
        try:
            _check(_libc.mount(b"tests", os.fsencode(top), b"fuse", 0, options))
        except OSError:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            os.close(device)

    def stop(self) -> None:
        """Keep the server from reading: processes that wait for it can be killed."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it read again, if it was stopped."""
        self._process.send_signal(signal.SIGCONT)

    def hold(self, *opcodes: int) -> None:
        """Read requests with these opcodes, but do not answer them, until the next call."""
        self._tell("hold", *opcodes)

    def fail(self, error: int, *opcodes: int) -> None:
        """Answer requests with these opcodes with an error; 0: as before."""
        self._tell("fail", error, *opcodes)

    def release(self) -> None:
        """Continue, answer all requests that were held, and hold none."""
        self.go_on()
        self._tell("hold")

    def held(self) -> list[int]:
        """Return the opcodes of the requests that are held."""
        return [int(each) for each in self._tell("held").split()]

    def close(self) -> None:
        """End the server, so that processes that wait get an error, and unmount."""
        self._process.kill()
        self._process.send_signal(signal.SIGCONT)
        self._process.wait()
        self._socket.close()
        _libc.umount2(os.fsencode(self.top), _MNT_DETACH)

    def _tell(self, *words: object) -> str:
        self._socket.send(" ".join(map(str, words)).encode())
        self._socket.settimeout(10)
        return self._socket.recv(4096).decode()


@contextmanager
def served(top: Path, files: dict[str, int]) -> Iterator[Served]:
    """Mount such a file system at `top` within this context, for this thread and processes that it starts."""
    top.mkdir()
    here, cwd = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), Path.cwd()
    try:
        _check(_libc.unshare(_CLONE_NEWNS))
        try:
            _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
            server = Served(top, files)
            try:
                yield server
            finally:
                server.close()
        finally:
            _check(_libc.setns(here, _CLONE_NEWNS))
            os.chdir(cwd)
    finally:
        os.close(here)


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _Server:
    """The server itself, in a process of its own."""

    def __init__(self, device: int, files: dict[str, int]) -> None:
        self._device = device
        self._names = {name: number for number, name in enumerate(files, _ROOT + 1)}
        self._data = {self._names[name]: bytearray(size) for name, size in files.items()}
        self._holds: set[int] = set()
        self._held: list[bytes] = []
        self._errors: dict[int, int] = {}

    def order(self, words: list[str]) -> str:
        """Carry out an order of the test, and return the reply."""
        match words:
            case ["hold", *opcodes]:
                self._holds = {int(each) for each in opcodes}
                held, self._held = self._held, []
                for request in held:
                    self.take(request)
            case ["fail", error, *opcodes]:
                self._errors.update((int(each), int(error)) for each in opcodes)
            case ["held"]:
                return " ".join(str(_IN.unpack_from(each)[1]) for each in self._held)
        return NOTHING

    def take(self, request: bytes) -> None:
        """Answer a request, unless it is to be held."""
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in _NO_ANSWER:
            return
        if opcode in self._holds:
            self._held.append(request)
            return
        try:
            if self._errors.get(opcode) and node != _ROOT | (opcode == LOOKUP):
                raise OSError(self._errors[opcode], "as told")
            answer, error = self._do(opcode, node, request[_IN.size :]), 0
        except OSError as problem:
            answer, error = b"", -(problem.errno or errno.EIO)
        with suppress(FileNotFoundError):  # it was killed meanwhile
            os.write(self._device, _OUT.pack(_OUT.size + len(answer), error, unique) + answer)

    def _do(self, opcode: int, node: int, body: bytes) -> bytes:
        data = self._data.get(node, bytearray())
        match opcode:
            case 26:  # INIT; by number: a name alone would match anything
                return _INIT.pack(7, 31, 0, 0, 16, 12, _MOST, 1, 32, 0, 0)
            case 1:
                name = os.fsdecode(body.rstrip(b"\0"))
                if name not in self._names:
                    raise OSError(errno.ENOENT, name)
                return struct.pack("=4Q2I", self._names[name], 1, 0, 0, 0, 0) + self._attributes(self._names[name])
            case 3 | 4:
                return struct.pack("=QII", 0, 0, 0) + self._attributes(node)
            case 14 | 27:
                return struct.pack("=QII", 0, 0, 0)
            case 15:
                _, offset, size = struct.unpack_from("=QQI", body)
                return bytes(data[offset : offset + size])
            case 16:
                _, offset, size = struct.unpack_from("=QQI", body)
                data[offset : offset + size] = body[40 : 40 + size]
                return struct.pack("=II", size, 0)
            case 17:
                return struct.pack("=5Q4I24x", 1 << 20, 1 << 19, 1 << 19, 100, 50, 4096, 255, 4096, 0)
            case 18 | 20 | 28 | 29 | 34:  # no FLUSH, for which even a killed process would wait
                return b""
        raise OSError(errno.ENOSYS, "not here")

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o600
        size = len(self._data.get(node, b""))
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def main(arguments: list[str]) -> None:
    """Serve until the test has gone, or the file system is unmounted."""
    import select

    device, orders = int(arguments[0]), socket.socket(fileno=int(arguments[1]))
    server = _Server(device, {name: int(size) for name, size in (each.split("=") for each in arguments[2:])})
    while True:
        ready = select.select([device, orders], [], [])[0]
        if orders in ready:
            words = orders.recv(4096).decode().split()
            if not words:
                return
            orders.send(server.order(words).encode())
        if device in ready:
            try:
                server.take(os.read(device, _MOST + 4096))
            except OSError as problem:
                if problem.errno == errno.ENODEV:
                    return
                if problem.errno not in (
                    errno.EINTR,
                    errno.EAGAIN,
                    errno.ENOENT,
                    errno.EPERM,
                ):  # EPERM: not mounted yet
                    raise


if __name__ == "__main__":
    main(sys.argv[1:])
