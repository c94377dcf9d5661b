"""io_uring without a library: set up, queue, enter, reap.

Must not know a request, a driver, or what a number in `user_data` stands for. One thread owns a ring.

A ring carries out operations without system calls that a filter (seccomp(2)) could see. So each ring is restricted to
the operations below before it can be used, and no later call lifts this. The number of kernel threads that work for a
ring is bounded, too: for operations on anything but regular files and block devices, which we never use, the kernel
would start thousands.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from array import array
from collections.abc import Sequence

from xenbackend.errors import KernelError
from xenbackend.kernel.memory import allocate, map_device, unmap, view_at
from xenbackend.units import round_up

# linux/io_uring.h
OP_READV = 1
OP_WRITEV = 2
OP_FSYNC = 3
OP_READ = 22
OP_WRITE = 23
FSYNC_DATASYNC = 1
_ALLOWED = (OP_READV, OP_WRITEV, OP_FSYNC, OP_READ, OP_WRITE)
_SETUP_CQSIZE = 1 << 3
_SETUP_CLAMP = 1 << 4
_SETUP_R_DISABLED = 1 << 6
_REGISTER_RESTRICTIONS, _REGISTER_ENABLE_RINGS, _REGISTER_IOWQ_MAX_WORKERS = 11, 12, 19
MOST_WORKERS = 32  # kernel threads for files and block devices; further operations wait for a free one
_RESTRICTION_SQE_OP = 1
_ENTER_GETEVENTS = 1
_OFF_SQ_RING = 0
_OFF_SQES = 0x10000000
# One mapping for both rings; no completion is dropped; iovecs may be reused after submission; OP_READ exists.
_FEATURES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3
# generic system call numbers: the same on x86-64 and Arm
_SYS_SETUP, _SYS_ENTER, _SYS_REGISTER = 425, 426, 427

_PARAMS = struct.Struct("=IIIIIIIIII")  # io_uring_params up to the two tables: sq_entries, cq_entries, flags, …
_PARAMS_SIZE = 120
_SQ_OFFSETS = struct.Struct("=IIIIIIII8x")  # head, tail, mask, entries, flags, dropped, array
_CQ_OFFSETS = struct.Struct("=IIIIIIII8x")  # head, tail, mask, entries, overflow, cqes, flags
_SQE = struct.Struct("=BBHiQQIIQ")  # opcode, flags, ioprio, fd, off, addr, len, op_flags, user_data: 40 of 64 bytes
_SQE_SIZE = 64
_CQE = struct.Struct("=QiI")  # user_data, res, flags
_RESTRICTION = struct.Struct("=HBB12x")  # opcode, the operation, reserved
_IOVECS = 8192  # of all operations that are queued and not yet submitted

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall  # without argtypes a call costs half


class Uring:
    """One io_uring: operations are queued, then submitted together, and come back from `reap` after `enter`.

    Invariants: no more operations are queued than the submission queue holds (a full queue is submitted at once). If
    the completion queue is full, the kernel keeps further completions (IORING_FEAT_NODROP) until the next `enter`.

    Args:
        entries: size of the submission queue, a power of two; limits the queued operations, not those in flight.

    Raises: KernelError: ENOSYS if there is no io_uring, EPERM if it is forbidden, EINVAL if it cannot be restricted
        (before Linux 5.10).
    """

    single = (OP_READ, OP_WRITE)
    vector = (OP_READV, OP_WRITEV)

    def __init__(self, entries: int = 256) -> None:
        self._fd, params = _setup(entries)
        self._mapped: list[tuple[int, int]] = []  # address, size
        try:
            _bound_workers(self._fd)
            _restrict(self._fd)
            self._map(params)
        except BaseException:
            self.close()
            raise
        iovecs = allocate(_IOVECS * 16)
        self._iovecs = iovecs.view.cast("Q")
        self._iovecs_address = iovecs.address
        self._iovecs_used = 0  # words
        self.queued = 0  # operations, not yet submitted
        self._early: list[tuple[int, int]] = []  # reaped to make room, not yet returned

    def _map(self, params: bytes) -> None:
        sq_entries, cq_entries, _, _, _, features, *_ = _PARAMS.unpack_from(params)
        if features & _FEATURES != _FEATURES:
            raise KernelError("use this kernel's io_uring, which is older than Linux 5.6's", errno.EOPNOTSUPP)
        _, sq_tail, sq_mask, _, _, _, sq_array, _ = _SQ_OFFSETS.unpack_from(params, 40)
        cq_head, cq_tail, cq_mask, _, _, cqes, _, _ = _CQ_OFFSETS.unpack_from(params, 80)
        size = max(sq_array + sq_entries * 4, cqes + cq_entries * _CQE.size)
        rings = self._map_part(_OFF_SQ_RING, round_up(size, 4))
        words = rings.cast("I")
        words[sq_array // 4 : sq_array // 4 + sq_entries] = memoryview(array("I", range(sq_entries)))
        self._sqes = self._map_part(_OFF_SQES, sq_entries * _SQE_SIZE)
        self._rings = rings
        self._words = words
        self._entries = sq_entries
        self._sq_mask, self._cq_mask = words[sq_mask // 4], words[cq_mask // 4]
        self._sq_tail_at, self._cq_head_at, self._cq_tail_at = sq_tail // 4, cq_head // 4, cq_tail // 4
        self._tail = words[self._sq_tail_at]
        self._cqes = cqes

    def _map_part(self, offset: int, size: int) -> memoryview:
        address = map_device(self._fd, size, offset, writable=True, operation="map io_uring's queues")
        self._mapped.append((address, size))
        return view_at(address, size, writable=True)

    def queue(
        self, opcode: int, fd: int, offset: int, address: int, length: int, user_data: int, op_flags: int = 0
    ) -> None:
        """Queue one operation; the memory at `address` must stay valid until the completion is reaped."""
        tail = self._tail
        place = (tail & self._sq_mask) * _SQE_SIZE
        _SQE.pack_into(self._sqes, place, opcode, 0, 0, fd, offset, address, length, op_flags, user_data)
        self._tail = tail + 1 & 0xFFFFFFFF
        self.queued += 1
        if self.queued == self._entries:
            self.submit()

    def queue_vector(self, opcode: int, fd: int, offset: int, iovecs: Sequence[int], user_data: int) -> None:
        """Queue OP_READV or OP_WRITEV: `iovecs` is address, length, address, length, … of at most IOV_MAX pieces."""
        start = self._iovecs_used
        end = start + len(iovecs)
        if end > len(self._iovecs):
            self.submit()
            start, end = 0, len(iovecs)
        self._iovecs[start:end] = memoryview(array("Q", iovecs))
        self._iovecs_used = end
        self.queue(opcode, fd, offset, self._iovecs_address + start * 8, len(iovecs) // 2, user_data)

    def queue_sync(self, fd: int, user_data: int) -> None:
        """Queue an fdatasync."""
        self.queue(OP_FSYNC, fd, 0, 0, 0, user_data, FSYNC_DATASYNC)

    def fileno(self) -> int:
        """Return the descriptor, which is readable while completions wait."""
        return self._fd

    def submit(self) -> None:
        """Submit the queue. Raises: KernelError."""
        self._enter(0)

    def enter(self) -> None:
        """Submit the queue and let the kernel post completions, without waiting. Raises: KernelError."""
        self._enter(_ENTER_GETEVENTS)

    def _enter(self, flags: int) -> None:
        self._words[self._sq_tail_at] = self._tail
        while True:
            done = _syscall(_SYS_ENTER, self._fd, self.queued, 0, flags, None, 0)
            if done >= 0:
                self.queued -= done
                if self.queued == 0:
                    break
                continue
            error = ctypes.get_errno()
            if error == errno.EBUSY:  # before Linux 5.19: nothing is taken while completions wait for room
                self._early += self.reap()
            elif error not in {errno.EINTR, errno.EAGAIN}:
                raise KernelError("submit to io_uring", error)
        self._iovecs_used = 0

    def reap(self) -> list[tuple[int, int]]:
        """Return the posted completions, as (user_data, byte count or negative errno)."""
        words = self._words
        head, tail = words[self._cq_head_at], words[self._cq_tail_at]
        rings, mask, cqes, unpack = self._rings, self._cq_mask, self._cqes, _CQE.unpack_from
        done, self._early = self._early, []
        while head != tail:
            user_data, result, _ = unpack(rings, cqes + (head & mask) * 16)
            done.append((user_data, result))
            head = head + 1 & 0xFFFFFFFF
        words[self._cq_head_at] = head
        return done

    def close(self) -> None:
        """Release the ring. Nothing may be in flight, and this object must not be used again."""
        for address, size in self._mapped:
            unmap(address, size)
        self._mapped.clear()
        os.close(self._fd)


def _setup(entries: int) -> tuple[int, bytes]:
    """Return the descriptor of a new, disabled ring, and its `io_uring_params`. Raises: KernelError."""
    params = ctypes.create_string_buffer(_PARAMS_SIZE)
    _PARAMS.pack_into(params, 0, 0, entries * 16, _SETUP_CQSIZE | _SETUP_CLAMP | _SETUP_R_DISABLED, 0, 0, 0, 0, 0, 0, 0)
    fd = _syscall(_SYS_SETUP, entries, ctypes.byref(params))
    if fd < 0:
        raise KernelError("set up io_uring", ctypes.get_errno())
    os.set_inheritable(fd, False)
    return fd, params.raw


def _bound_workers(fd: int) -> None:
    """Limit the threads that the kernel starts for a ring. Linux before 5.15 has no such limit, which is no error.

    There are two limits: for files and block devices, where the kernel's own limit of four per CPU is kept if it is
    lower, and for everything else. Source: io_uring_register(2). Raises: KernelError.
    """
    most = array("I", (min(MOST_WORKERS, 4 * (os.cpu_count() or 1)), 1))
    address, count = most.buffer_info()
    if _syscall(_SYS_REGISTER, fd, _REGISTER_IOWQ_MAX_WORKERS, ctypes.c_void_p(address), count) < 0:
        error = ctypes.get_errno()
        if error != errno.EINVAL:
            raise KernelError("bound io_uring's threads", error)


def _restrict(fd: int) -> None:
    """Restrict a new ring to the allowed operations, and enable it. Raises: KernelError."""
    allowed = b"".join(_RESTRICTION.pack(_RESTRICTION_SQE_OP, operation, 0) for operation in _ALLOWED)
    if _syscall(_SYS_REGISTER, fd, _REGISTER_RESTRICTIONS, allowed, len(_ALLOWED)) < 0:
        raise KernelError("restrict io_uring", ctypes.get_errno())
    if _syscall(_SYS_REGISTER, fd, _REGISTER_ENABLE_RINGS, None, 0) < 0:
        raise KernelError("enable io_uring", ctypes.get_errno())
