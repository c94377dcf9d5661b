"""A load generator on a split virtqueue in shared memory: virtio-blk requests to a vhost-user backend.

Must not speak the vhost-user protocol itself.

As much as possible is written in advance: each slot owns a chain of three descriptors (header, data, status), so that a
request costs two stores: its sector, and its entry in the available ring. A batch is published and kicked at once.

Source: virtio 1.1, "2.6 Split Virtqueues" and "5.2 Block Device"; "2.6.7" and "2.6.8" for the event indices.
"""

from __future__ import annotations

import mmap
import os
import select
from array import array
from itertools import cycle
from struct import Struct

from xenbackend.bench.loop import STALL, ClosedLoop
from xenbackend.bench.plan import DEPTH, LENGTH, BenchError, Work
from xenbackend.bench.vhost_user import QueueAddresses, VhostUser
from xenbackend.kernel.ports import Fence
from xenbackend.units import SECTOR

ENTRIES = 256  # of the queue; the first descriptor of slot n is n, then n + 64, n + 128
_SLOTS = 64
_DESCRIPTORS, _AVAILABLE, _USED = 0, 4096, 8192  # offsets in the shared memory
_HEADERS, _STATUS, _DATA = 12288, 16384, 65536
_SIZE = _DATA + DEPTH * LENGTH
_DESCRIPTOR = Struct("=QIHH")  # address, length, flags, next
_NEXT, _DEVICE_WRITES = 1, 2  # VIRTQ_DESC_F_*
_IN, _OUT = 0, 1  # VIRTIO_BLK_T_*
_WRAP = 0xFFFF  # indices are free-running and 16 bits wide
_ONE = (1).to_bytes(8, "little")


class VirtqueueLoop(ClosedLoop):
    """Keeps requests in flight on queue 0 of the backend at a Unix socket.

    Raises: BenchError, OSError as `VhostUser`.
    """

    def __init__(self, name: str, path: str, fence: Fence) -> None:
        self.name = name
        self._fence = fence
        self._backend = VhostUser(path)
        self.size = self._backend.capacity() * SECTOR
        descriptor = os.memfd_create("virtqueue")
        os.ftruncate(descriptor, _SIZE)
        self._memory = memoryview(mmap.mmap(descriptor, _SIZE))
        self._kick = os.eventfd(0)
        self._call = os.eventfd(0)
        self._poll = select.poll()
        self._poll.register(self._call, select.POLLIN)
        self._backend.share(descriptor, _SIZE)
        self._backend.start_queue(QueueAddresses(ENTRIES, _DESCRIPTORS, _AVAILABLE, _USED), self._kick, self._call)
        os.close(descriptor)
        self._available = self._memory[_AVAILABLE : _AVAILABLE + 6 + 2 * ENTRIES].cast("H")
        self._used_index = self._memory[_USED : _USED + 4].cast("H")
        self._used = self._memory[_USED + 4 : _USED + 4 + 8 * ENTRIES].cast("I")[::2]
        self._kick_event = self._memory[_USED + 4 + 8 * ENTRIES : _USED + 6 + 8 * ENTRIES].cast("H")
        self._issued = 0
        self._reaped = 0

    def start(self, work: Work, places: list[int]) -> None:
        """Write the slots' descriptors, and issue the first requests."""
        self._write = work.write
        self._depth = work.depth
        self._places = cycle(places)
        self._sectors = self._memory[_HEADERS : _HEADERS + 16 * work.depth].cast("Q")[1::2]
        data = self._memory[_DATA : _DATA + work.depth * work.length]
        self._stamps = data.cast("Q")[:: work.length // 8]
        self._status = self._memory[_STATUS : _STATUS + work.depth]
        self._all_good = bytes(work.depth)
        self._status[:] = self._all_good
        for slot in range(work.depth):
            self._prepare(slot, work)
        # So that `renew` finds in every slot what a finished read would have left there.
        self._sectors[:] = self._stamps[:] = memoryview(array("Q", bytes(8 * work.depth)))
        self.renew(list(range(work.depth)))

    def _prepare(self, slot: int, work: Work) -> None:
        header = _HEADERS + 16 * slot
        self._memory[header : header + 4] = (_OUT if work.write else _IN).to_bytes(4, "little")
        data = _DATA + work.length * slot
        direction = 0 if work.write else _DEVICE_WRITES
        self._describe(slot, header, 16, _NEXT, slot + _SLOTS)
        self._describe(slot + _SLOTS, data, work.length, _NEXT | direction, slot + 2 * _SLOTS)
        self._describe(slot + 2 * _SLOTS, _STATUS + slot, 1, _DEVICE_WRITES, 0)

    def _describe(self, number: int, address: int, length: int, flags: int, following: int) -> None:
        _DESCRIPTOR.pack_into(self._memory, _DESCRIPTORS + 16 * number, address, length, flags, following)

    def reap(self) -> list[int]:
        """Take all entries of the used ring; wait if there are none."""
        old = self._reaped
        if self._used_index[1] == old:
            self.wait(lambda: self._used_index[1] - old, self._sleep)
        new = self._used_index[1]
        self._reaped = new
        first, last = old % ENTRIES, new % ENTRIES
        if first < last:
            finished = self._used[first:last].tolist()
        else:
            finished = self._used[first:].tolist() + self._used[:last].tolist()
        if self._status != self._all_good:
            raise BenchError(f"{self.name} answered a request with status {max(self._status)}")
        return finished

    def _sleep(self) -> int:
        """Ask for a notification of the next used entry, check once more, then sleep."""
        old = self._reaped
        self._available[2 + ENTRIES] = old
        self._fence()
        while not (found := self._used_index[1] - old):
            if not self._poll.poll(STALL * 1000):
                raise self.stalled()
            os.read(self._call, 8)
        return found

    def renew(self, finished: list[int]) -> int:
        """Put the next places into the finished slots, publish them together, and kick if asked to."""
        sectors, stamps = self._sectors, self._stamps
        if self._write:
            for slot, place in zip(finished, self._places, strict=False):
                sectors[slot] = place
                stamps[slot] = place
        else:
            for slot, place in zip(finished, self._places, strict=False):
                if stamps[slot] != sectors[slot]:
                    raise self.wrong_data(sectors[slot], stamps[slot])
                sectors[slot] = place
        self._publish(finished)
        return finished[self._issued % len(finished)]

    def _publish(self, slots: list[int]) -> None:
        old = self._issued
        new = (old + len(slots)) & _WRAP
        ring = self._available
        for number, slot in enumerate(slots, old):
            ring[2 + number % ENTRIES] = slot
        ring[1] = self._issued = new
        self._fence()
        if (new - self._kick_event[0] - 1) & _WRAP < len(slots):
            os.write(self._kick, _ONE)

    def close(self) -> None:
        """Disconnect and close the eventfds. The memory is released with the last view of it."""
        self._backend.close()
        os.close(self._kick)
        os.close(self._call)
