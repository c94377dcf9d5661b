"""A hostile frontend: raw slots, memory that changes, and what the worker uses meanwhile.

Must not check more than an honest frontend would: the tests do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.driven import Driven
from xenbackend.blkif.abi import (
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    RSP_PROD,
)
from xenbackend.units import SECTOR

SECTORS = 2048
RAM = f"ram:{SECTORS * SECTOR}"
GNTST = range(-12, 0)  # every status that is not okay, grant_table.h
DATA = (BLKIF_OP_READ, BLKIF_OP_WRITE)
OK, ERROR, UNSUPPORTED = BLKIF_RSP_OKAY, BLKIF_RSP_ERROR, BLKIF_RSP_EOPNOTSUPP


class Evil:
    """A ring into which the guest writes anything."""

    def __init__(self, driven: Driven, ring: int = 0) -> None:
        self.guest = driven.guest
        self.ring = driven.frontend.rings[ring]
        self.layout = self.ring.layout

    def page(self, *, read_only: bool = False) -> tuple[int, memoryview]:
        """Return the gref and the bytes of a new page."""
        frame = self.guest.allocate(1)[0]
        return self.guest.grant(frame, read_only=read_only), self.guest.page(frame)

    def send(self, *slots: bytes) -> list[tuple[int, int, int]]:
        """Send requests, as many at a time as fit; return (id, operation, status) of each response, by id."""
        answers = []
        for start in range(0, len(slots), self.ring.ring.size):
            part = slots[start : start + self.ring.ring.size]
            for slot in part:
                self.ring.put_raw(slot)
            self.ring.push()
            answers += [self._answer() for _ in part]
        return sorted(answers)

    def statuses(self, *slots: bytes) -> list[int]:
        """Send requests whose ids count up from 0; return their statuses in that order."""
        answers = self.send(*slots)
        assert list(range(len(slots))) == [guest_id for guest_id, _, _ in answers]
        return [status for _, _, status in answers]

    def _answer(self) -> tuple[int, int, int]:
        ring = self.ring.ring
        while not (ring.waiting() or ring.final_check()):
            assert self.ring.port.wait(10), "no answer"
        guest_id, operation, status, raw = ring.take()
        assert self.layout.response.pack(guest_id, operation, status) == raw
        return guest_id, operation, status


def resident(driven: Driven) -> int:
    """Return the bytes of memory that the worker uses."""
    status = Path(f"/proc/{driven.worker.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def descriptors(driven: Driven) -> int:
    """Return how many descriptors the worker has open."""
    return len(os.listdir(f"/proc/{driven.worker.process.pid}/fd"))


def until_answered(evil: Evil) -> None:
    """Wait until as many responses are published as requests were, without looking at any."""
    give_up = time.monotonic() + 10
    while evil.ring.ring.index[RSP_PROD] != evil.ring.ring.pushed:
        assert time.monotonic() < give_up, "no answer"


_FLIP = """
import mmap, sys
memory = mmap.mmap({fd}, 0)
one, other = bytes.fromhex({one!r}), bytes.fromhex({other!r})
print("ready", flush=True)
while True:
    memory[{at}:{end}] = one
    memory[{at}:{end}] = other
"""


@contextmanager
def flipping(driven: Driven, at: int, one: bytes, other: bytes) -> Iterator[None]:
    """Have another process write two contents in turn, as fast as it can, at an address of the guest's memory."""
    fd = driven.guest._memory_fd
    program = _FLIP.format(fd=fd, at=at, end=at + len(one), one=one.hex(), other=other.hex())
    with subprocess.Popen([sys.executable, "-c", program], pass_fds=[fd], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
