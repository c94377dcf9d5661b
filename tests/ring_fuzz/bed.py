"""What messages are sent to: a connection as a worker has it, a guest with good and bad pages, and neighbours.

Must not choose a message, nor forgive one: whatever is not as it has to be raises `Violation`.

The neighbours are the other ring of the same disk, whose data is verified, the disk's first half, pages that the guest
has not granted for writing, and another domain that has granted pages under the same numbers.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from random import Random

from tests.driven import DOMID
from tests.ring_fuzz.judge import Agreement
from tests.ring_fuzz.messages import ATTACKED, POOL, SECTORS
from tests.ring_fuzz.near import NearServed
from tests.ring_fuzz.pages import SILENCE, Pages
from tests.ring_fuzz.rewriter import Rewriter
from tests.served import HeldDisk
from tests.workload import Load, make_model
from xenbackend.blkif.abi import BLKIF_OP_READ, RSP_PROD, X86_32, X86_64
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.pattern import DiskModel
from xenbackend.units import SECTOR
from xenbackend.worker.barrier import Barrier

ORDERS = (0, 1, 2, 3, 4)  # of rings


class Violation(Exception):
    """Something that no message may lead to."""


class SternDisk(HeldDisk):
    """A disk that knows what may reach it.

    allowed   by the id of a message, what of it the disk may see
    open      ids of messages of which it may see any read
    attacked  the queue that messages come from
    wrong     the first thing that should not have come; an exception would be the engine's to contain
    """

    def __init__(self) -> None:
        super().__init__(SECTORS * SECTOR)
        self.allowed: dict[int, list[tuple[int, int, int]]] = {}
        self.open: set[int] = set()
        self.attacked: object = None
        self.read_only = False
        self.wrong = ""
        self._bytes = memoryview(self.content)

    def submit(self, batch: list[Request]) -> None:
        """Take requests that lie on the disk, and that somebody may have asked for."""
        for request in batch:
            self.wrong = self.wrong or self._look_at(request)
        if self.holding:
            self.held += batch
            return
        for request in batch:
            self._do_or_fail(request)
        self.complete(batch)

    def clear(self) -> None:
        """Be a disk of zeros again."""
        self._bytes[:] = bytes(len(self._bytes))

    def _look_at(self, request: Request) -> str:
        tag, operation, offset, length = request.tag, int(request.op), request.offset, request.length
        record = tag.record if isinstance(tag, Barrier) else tag
        if operation in (Op.READ, Op.WRITE) and length != sum(map(len, request.iov)):
            return f"a request of {length} bytes with {sum(map(len, request.iov))} bytes of memory"
        if offset < 0 or offset + length > len(self._bytes):
            return f"bytes from {offset} on, {length} of them, reached the disk"
        if self.read_only and operation not in (Op.READ, Op.FLUSH):
            return f"operation {operation} reached a disk that is read-only"
        if record.owner is not self.attacked:
            return ""
        seen = (operation, 0 if operation == Op.FLUSH else offset, length)
        allowed = self.allowed.get(record.guest_id, ())
        if seen in allowed or (record.guest_id in self.open and operation == Op.READ):
            return ""
        if operation == Op.FLUSH and isinstance(tag, Barrier):
            return ""
        return f"{seen} reached the disk for message {record.guest_id:#x}, which says {allowed}"


class Bed:
    """One guest, served again and again. A process has one."""

    def __init__(self, directory: Path) -> None:
        self.disk = SternDisk()
        self.vbd = NearServed(directory, self.disk)
        self.vbd.policy = "enospc=report,read=report,write=report"
        guest = self.guest = self.vbd.guest
        self.pages = Pages(guest)
        self.frames, self.lists, self.list_pages = self.pages.frames, self.pages.lists, self.pages.list_pages
        self._fill_neighbour()
        self.rewriter = Rewriter(guest._memory_fd)
        self.load: Load
        self.model: DiskModel
        self.agreed: Agreement
        self._held_at_start = 0
        self._open_at_start = 0

    def _fill_neighbour(self) -> None:
        self.neighbour = Guest("", DOMID + 1, pages=POOL, connection=self.vbd.xen.connect())
        for frame in self.neighbour.allocate(POOL):
            self.neighbour.grant(frame)
            self.neighbour.page(frame)[:] = SILENCE

    def connect(self, random: Random) -> None:
        """Serve the guest anew, agreed on otherwise."""
        vbd = self.vbd
        layout = random.choice((X86_64, X86_64, X86_32))
        order, persistent = random.choice(ORDERS), random.random() < 0.5
        read_only, can_flush, can_discard = random.random() < 0.15, random.random() < 0.9, random.random() < 0.8
        start = random.choice((0, 0, 2**31 - 9, 2**32 - 9, random.getrandbits(32)))
        vbd.geometry = Geometry(
            SECTORS * SECTOR, read_only=read_only, can_flush=can_flush, can_discard=can_discard,
            discard_granularity=SECTOR,
        )  # fmt: skip
        wishes = Wishes(layout, ring_order=order, queues=2, persistent=persistent, indirect=64, start_index=start)
        del vbd.nodes.values
        vbd.nodes.values = {
            f"/local/domain/{DOMID}/device/vbd/51712/backend": f"/local/domain/0/backend/vbd/{DOMID}/51712"
        }
        self.disk.clear()
        self.disk.errors, self.disk.holding, self.disk.read_only = {}, False, read_only
        self.disk.attacked = None
        self._open_at_start, self._held_at_start = len(os.listdir("/proc/self/fd")), sum(vbd.xen.held().values())
        frontend = vbd.connect(wishes)
        self.hostile = frontend.rings.pop()
        self.queue = vbd.engine.queues[1]
        self.disk.attacked = self.queue
        self.model = make_model(random.getrandbits(32), ATTACKED, 32, can_discard=can_discard and not read_only)
        if read_only:
            self.model.operations = (BLKIF_OP_READ,)
        self.load = Load(frontend, self.model)
        self.agreed = self.pages.agree(layout, read_only=read_only, can_flush=can_flush, can_discard=can_discard)

    def step(self) -> None:
        """Let the worker's loop pass once."""
        self.vbd.step()

    def disconnect(self) -> None:
        """Let the worker go, and see that it has left nothing and touched nothing."""
        vbd = self.vbd
        self.disk.holding = False
        if self.disk.held:
            self.disk.give_back()
        self.load.finish()
        for _ in range(4):
            if vbd.disconnect():
                break
        else:
            raise Violation("the worker does not let go of the rings")
        self._see_that_nothing_is_left()
        self._see_that_nothing_was_touched()
        self.hostile.ring.index[RSP_PROD] = 0
        for ring in (*vbd.frontend.rings, self.hostile):
            ring.close()  # which raises where a page is still mapped
        gc.collect()
        opened = len(os.listdir("/proc/self/fd"))
        if opened > self._open_at_start:  # fewer: what somebody else had left in this process is gone
            raise Violation(f"{opened} descriptors are open where {self._open_at_start} were")
        vbd.complaints.clear()
        vbd.halted.clear()

    def _see_that_nothing_is_left(self) -> None:
        vbd = self.vbd
        held = vbd.xen.held()
        if sum(held.values()) != self._held_at_start:
            raise Violation(f"the worker still holds {held}")
        if vbd.bugs:
            raise Violation(f"a bug came to the loop: {vbd.bugs[0]!r}") from vbd.bugs[0]
        if vbd.alarms:
            raise Violation(f"an alarm: {vbd.alarms[0]}")

    def _see_that_nothing_was_touched(self) -> None:
        if self.pages.are_touched():
            raise Violation("a page was written to that the guest had not granted for it")
        if bytes(self.neighbour.memory) != SILENCE * POOL:
            raise Violation("another domain's memory was written to")
        if self.vbd.xen.held(DOMID + 1) != {"mappings": 0, "pins": 0, "ports": 0}:
            raise Violation("another domain's page is mapped")

    def close(self) -> None:
        """Release everything."""
        self.rewriter.close()
        self.neighbour.close()
        self.vbd.close()
