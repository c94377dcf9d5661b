"""The load generator on a blkif ring with its inner loop in C, `bench/c/blkif_loop.c`.

Must not differ from `BlkifLoop` in what goes through the ring: the same tests cover both.

Python can issue a request every 0.5 us at best, and needs 2 us to wake up, so with a good backend it would be the
limit. A call into the library ends after `_SLICE`, so that Python can handle signals.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from pathlib import Path

from xenbackend.bench.blkif import BlkifLoop
from xenbackend.bench.loop import STALL, Window
from xenbackend.bench.plan import BenchError, Work
from xenbackend.kernel.memory import address_of
from xenbackend.kernel.ports import Fence
from xenbackend.rig.guest import Guest

_SLICE = 50_000_000  # ns
_ROOM = 1 << 16  # latencies that one call can return
_NOT_TIMED = -1
# enum status of blkif_loop.c
_DONE, _INTERRUPTED, _STALLED, _TOO_MANY, _FAILED, _WRONG_DATA, _CANNOT_NOTIFY = range(7)


class _State(ctypes.Structure):
    """struct loop of blkif_loop.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ring", "memory", "images", "places", "stamps_at", "latencies")),
        *(
            (name, ctypes.c_uint64)
            for name in ("place_count", "next_place", "latency_room", "latency_count", "requests", "waited_ns",
                         "poll_ns", "now", "issued_at", "wanted", "found")
        ),
        ("timed", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("depth", "produced", "consumed", "stall_ms", "operation")),
        *((name, ctypes.c_int32) for name in ("incoming", "outgoing", "writes", "verifies")),
    )  # fmt: skip


class NativeBlkifLoop(BlkifLoop):
    """`BlkifLoop` with the library that `native.build` made. Raises: OSError if the file is not a library."""

    def __init__(self, name: str, guest: Guest, fence: Fence, *, persistent: bool, verify: bool, library: Path) -> None:
        super().__init__(name, guest, fence, persistent=persistent, verify=verify)
        functions = ctypes.CDLL(str(library))
        self._renew = functions.loop_renew
        self._renew.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        self._reap = functions.loop_reap
        self._reap.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._run = functions.loop_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._numbers = (ctypes.c_uint32 * self._ring.size)()
        self._count = ctypes.c_uint32()
        self._latencies = array("Q", bytes(8 * _ROOM))
        self._state = _State(
            ring=address_of(self._ring.pages),
            memory=address_of(guest.memory),
            latencies=self._latencies.buffer_info()[0],
            latency_room=_ROOM,
            timed=_NOT_TIMED,
            produced=self._ring.produced,
            consumed=self._ring.consumed,
            stall_ms=int(STALL * 1000),
            incoming=self._front.port.fileno(),
            outgoing=self._front.port.outgoing(),
            verifies=verify,
        )
        self._at = ctypes.byref(self._state)

    def _prepare(self, work: Work, places: list[int]) -> None:
        super()._prepare(work, places)
        # Kept here, since the library only has their addresses.
        self._place_words, self._stamp_words = array("Q", places), array("Q", self._stamps_at)
        state = self._state
        state.images = address_of(self._encoded)
        state.places, state.place_count = self._place_words.buffer_info()
        state.stamps_at = self._stamp_words.buffer_info()[0]
        state.next_place = 0
        state.depth, state.operation, state.writes = work.depth, self._operation, work.write
        state.poll_ns = self.poll_ns

    def reap(self) -> list[int]:
        """Take all responses; wait if there are none."""
        while (status := self._reap(self._at, self._numbers, ctypes.byref(self._count))) == _INTERRUPTED:
            pass  # Python has handled the signal
        self._check(status)
        finished: list[int] = self._numbers[: self._count.value]
        return finished

    def renew(self, finished: list[int]) -> int:
        """Put the next places into the finished slots, publish them together, and notify if asked to."""
        self._numbers[: len(finished)] = [*finished]
        self._check(self._renew(self._at, self._numbers, len(finished)))
        produced: int = self._state.produced
        return finished[produced % len(finished)]

    def run(self, seconds: float) -> Window:
        """Run the loop for `seconds`, or longer until one request was timed."""
        state = self._state
        state.requests = state.waited_ns = 0
        state.timed = _NOT_TIMED
        latencies = array("Q")
        begin = now = state.now = time.perf_counter_ns()  # CLOCK_MONOTONIC, as in the library
        deadline = begin + int(seconds * 1e9)
        while now < deadline or not latencies:
            status = self._run(self._at, min(max(deadline, now + 1), now + _SLICE))
            if status != _INTERRUPTED:
                self._check(status)
            latencies.extend(self._latencies[: state.latency_count])
            now = state.now
        return Window(state.requests, (now - begin) / 1e9, 1 - state.waited_ns / (now - begin), latencies)

    def _check(self, status: int) -> None:
        if status == _DONE:
            return
        if status == _STALLED:
            raise self.stalled()
        if status == _TOO_MANY:
            raise self.too_many(self._state.found)
        if status == _FAILED:
            raise self.failed()
        if status == _WRONG_DATA:
            raise self.wrong_data(self._state.wanted, self._state.found)
        assert status == _CANNOT_NOTIFY  # noqa: S101 - there is no other status
        raise BenchError(f"{self.name} could not be notified")
