"""Linux AIO without a library: queue, submit together, sleep, reap.

Must not know a request, a driver, or what a number in `user_data` stands for. One thread owns a context.

AIO has one advantage over io_uring: when a process is killed, Linux keeps its memory mapped until the disk has finished
all operations (`exit_aio` in fs/aio.c). A guest's memory must not be unmapped earlier: Linux would tear down the
mapping of the grant behind Xen's back, and neither the page nor the grant could be used again.

Source: linux/aio_abi.h, io_submit(2).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from array import array
from collections.abc import Sequence

from xenbackend.errors import KernelError
from xenbackend.kernel.memory import allocate

# linux/aio_abi.h, IOCB_CMD_*
OP_READ = 0
OP_WRITE = 1
_FDSYNC = 3
_POLL = 5
OP_READV = 7
OP_WRITEV = 8

_IOCB = struct.Struct("=QIiHhiQQqQII")  # data, key, rw_flags, opcode, reqprio, fd, buf, nbytes, offset, -, flags, resfd
_EVENT = struct.Struct("=QQqq")  # data, obj, res, res2
_DATA = struct.Struct("=Q")
_TIMESPEC = struct.Struct("=qq")  # seconds, nanoseconds
_POLLIN = 1
_IOVECS = 8192  # of all operations that are queued and not yet submitted
MAX_IOVECS = 1024  # IOV_MAX: of one operation
_RETRY_S = 0.01  # after the kernel took no operation, perhaps for lack of memory
# io_setup, io_destroy, io_submit, io_getevents: asm/unistd_64.h, and asm-generic/unistd.h for newer architectures
_CALLS = (206, 207, 209, 208) if platform.machine() == "x86_64" else (0, 1, 2, 4)
_SYS_SETUP, _SYS_DESTROY, _SYS_SUBMIT, _SYS_GETEVENTS = _CALLS

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall  # without argtypes a call costs half


class Aio:
    """One context: operations are queued, then submitted together, and come back from `reap` after `wait`.

    Invariant: at most `entries` operations are in flight; the kernel takes no more. An operation that it does not take
    stays queued.

    Args:
        entries: all contexts of a host together may have fs.aio-max-nr entries, 65536 by default.

    Raises: KernelError: ENOSYS if the kernel has no AIO, EAGAIN if other contexts use all entries of the host.
    """

    single = (OP_READ, OP_WRITE)
    vector = (OP_READV, OP_WRITEV)

    def __init__(self, entries: int = 256) -> None:
        context = ctypes.c_ulong(0)
        if _syscall(_SYS_SETUP, entries, ctypes.byref(context)) < 0:
            raise KernelError("set up asynchronous I/O (fs.aio-max-nr)", ctypes.get_errno())
        self._context = context
        self._entries = entries
        iocbs, pointers = allocate(entries * _IOCB.size), allocate(entries * 8)
        iovecs, events = allocate(_IOVECS * 16), allocate(entries * _EVENT.size)
        places = range(iocbs.address, iocbs.address + entries * _IOCB.size, _IOCB.size)
        pointers.view.cast("Q")[:entries] = memoryview(array("Q", places))
        self._iocbs, self._events, self._iovecs = iocbs.view, events.view, iovecs.view.cast("Q")
        self._keep = pointers  # only its address is used; this keeps the memory
        self._pointers, self._iovecs_address = pointers.address, iovecs.address
        self._events_address = ctypes.c_void_p(events.address)
        self._iovecs_used = 0  # words
        self._first = 0  # of the queued iocbs
        self.queued = 0  # operations, not yet submitted
        self._done: list[tuple[int, int]] = []  # not yet returned
        self._timespec = ctypes.create_string_buffer(_TIMESPEC.size)

    def queue(self, opcode: int, fd: int, offset: int, address: int, length: int, user_data: int) -> None:
        """Queue one operation; the memory at `address` must stay valid until the completion is reaped."""
        if self._first + self.queued == self._entries:
            self._submit_all()
        place = (self._first + self.queued) * _IOCB.size
        _IOCB.pack_into(self._iocbs, place, user_data, 0, 0, opcode, 0, fd, address, length, offset, 0, 0, 0)
        self.queued += 1

    def queue_vector(self, opcode: int, fd: int, offset: int, iovecs: Sequence[int], user_data: int) -> None:
        """Queue OP_READV or OP_WRITEV: `iovecs` is address, length, address, length, … of at most MAX_IOVECS pieces."""
        if self._iovecs_used + len(iovecs) > len(self._iovecs):
            self._submit_all()
        start = self._iovecs_used
        self._iovecs_used = end = start + len(iovecs)
        self._iovecs[start:end] = memoryview(array("Q", iovecs))
        self.queue(opcode, fd, offset, self._iovecs_address + start * 8, len(iovecs) // 2, user_data)

    def queue_sync(self, fd: int, user_data: int) -> None:
        """Queue an fdatasync."""
        self.queue(_FDSYNC, fd, 0, 0, 0, user_data)

    def queue_poll(self, fd: int, user_data: int) -> None:
        """Queue a poll of a descriptor, which completes once when it is readable."""
        self.queue(_POLL, fd, 0, _POLLIN, 0, user_data)

    def submit(self) -> None:
        """Submit the queue as far as the kernel takes it. `reap` returns a refused operation with its error."""
        while self.queued:
            pointers = ctypes.c_void_p(self._pointers + self._first * 8)
            taken = _syscall(_SYS_SUBMIT, self._context, self.queued, pointers)
            if taken < 0:
                error = ctypes.get_errno()
                if error == errno.EAGAIN:
                    return
                self._done.append((_DATA.unpack_from(self._iocbs, self._first * _IOCB.size)[0], -error))
                taken = 1
            self._first += taken
            self.queued -= taken
        self._first = self._iovecs_used = 0

    def enter(self) -> None:
        """Submit the queue and collect completions, without waiting. Raises: KernelError."""
        self.wait(0)

    def wait(self, timeout_s: float | None) -> None:
        """Submit the queue and sleep until something completes, at most `timeout_s`. Raises: KernelError."""
        if self.queued:
            self.submit()
            if self.queued:
                timeout_s = _RETRY_S if timeout_s is None else min(timeout_s, _RETRY_S)
        self._get_events(0 if self._done else timeout_s)

    def reap(self) -> list[tuple[int, int]]:
        """Return the completions up to the last `wait`, as (user_data, byte count or negative errno)."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Release the context, which takes some 35 ms; only polls may be in flight."""
        _syscall(_SYS_DESTROY, self._context)

    def _submit_all(self) -> None:
        """Make room: submit the queue and sleep until the kernel has taken all of it."""
        self.submit()
        while self.queued:
            self._get_events(_RETRY_S)
            self.submit()

    def _get_events(self, timeout_s: float | None) -> None:
        limit = None
        if timeout_s is not None:
            limit = self._timespec
            _TIMESPEC.pack_into(limit, 0, int(timeout_s), int(timeout_s % 1 * 1e9))
        least = 0 if timeout_s == 0 else 1
        count = _syscall(_SYS_GETEVENTS, self._context, least, self._entries, self._events_address, limit)
        if count < 0:
            error = ctypes.get_errno()
            if error != errno.EINTR:
                raise KernelError("wait for asynchronous I/O", error)
        elif count:
            events = self._events[: count * _EVENT.size]
            self._done += [(user_data, result) for user_data, _, result, _ in _EVENT.iter_unpack(events)]
