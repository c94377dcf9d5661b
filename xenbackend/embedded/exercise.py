"""A guest that tests its disk: it fills an area with identifiable data, mixes requests, verifies, and restores.

Must not print. The caller passes a function that is told about progress.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_RSP_OKAY
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Frontend
from xenbackend.rig.guest_ring import Submitted
from xenbackend.rig.pattern import DiskModel, Step
from xenbackend.units import SECTOR

DEPTH = 16  # requests in flight
LARGE = 1024  # sectors of a large request: 512 KiB
PAGE_SECTORS = 8


@dataclass(slots=True)
class Phase:
    """The result of one phase: bytes moved, duration in seconds, and the latency of each request in seconds."""

    name: str
    total: int  # bytes; 0 for a phase that runs for a given time
    moved: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def latency(self, fraction: float) -> float:
        """Return the latency in seconds that `fraction` of the requests did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] if ordered else 0.0


Progress = Callable[[Phase], None]


class Exercise:
    """Drives one connected frontend over the first `size` bytes of its disk.

    Any phase raises WrongData as soon as a sector has the wrong content, and XenbackendError if a request fails.
    """

    def __init__(self, frontend: Frontend, size: int, seed: int, progress: Progress) -> None:
        """Use a frontend; `size` in bytes, at least a sector, is limited to the disk's, and to whole pages if any."""
        sectors = min(size // SECTOR, frontend.facts.sectors)
        unit = PAGE_SECTORS if sectors >= PAGE_SECTORS else 1
        sectors -= sectors % unit
        self.size = sectors * SECTOR
        self.phases: list[Phase] = []
        self._frontend = frontend
        self._progress = progress
        self._largest = min(LARGE, (frontend.facts.max_indirect or 11) * PAGE_SECTORS)
        self._model = DiskModel(seed, sectors, Random(seed), max_count=unit, alignment=unit)
        self._before: dict[int, bytes] = {}  # first sector -> former content

    def save(self) -> None:
        """Read the content of the area, so that it can be restored."""
        steps = (Step(BLKIF_OP_READ, sector, count) for sector, count in self._areas())
        self._run(Phase("save", self.size), steps, lambda step, data: self._before.update({step.sector: data}))

    def fill(self) -> None:
        """Write every sector once, in large requests."""
        steps = (self._model.step(BLKIF_OP_WRITE, sector, count) for sector, count in self._areas())
        self._run(Phase("fill", self.size), steps, lambda _step, _data: None)
        self._frontend.flush()

    def mix(self, seconds: float) -> None:
        """Read and write random pages for some time; every read is verified."""
        end = time.monotonic() + seconds

        def steps() -> Iterator[Step]:
            while time.monotonic() < end:
                step = self._model.next_step()
                if step is not None:
                    yield step

        self._run(Phase("mix", 0), steps(), lambda _step, _data: None)
        self._frontend.flush()

    def verify(self) -> None:
        """Read every sector and check it."""
        steps = (self._model.step(BLKIF_OP_READ, sector, count) for sector, count in self._areas())
        self._run(Phase("verify", self.size), steps, lambda _step, _data: None)

    def restore(self) -> None:
        """Write the former content back, make it durable, and verify it."""
        if not self._before:
            return
        before = self._before
        self._frontend.drain()
        steps = [Step(BLKIF_OP_WRITE, sector, len(data) // SECTOR, data) for sector, data in before.items()]
        self._run(Phase("restore", self.size), iter(steps), lambda _step, _data: None)
        self._frontend.flush()
        reads = (Step(BLKIF_OP_READ, step.sector, step.count) for step in steps)
        self._run(Phase("verify restored", self.size), reads, lambda step, data: _compare(step, data, before))

    def read_all(self, sink: Callable[[bytes], object]) -> None:
        """Read the whole disk as the guest does, and pass the bytes to `sink` in order."""
        sectors = self._frontend.facts.sectors
        for sector in range(0, sectors, self._largest):
            sink(self._frontend.read(sector, min(self._largest, sectors - sector)))

    def _areas(self) -> Iterator[tuple[int, int]]:
        sectors = self.size // SECTOR
        for sector in range(0, sectors, self._largest):
            yield sector, min(self._largest, sectors - sector)

    def _run(self, phase: Phase, steps: Iterator[Step], take: Callable[[Step, bytes], None]) -> None:
        """Keep DEPTH requests in flight until `steps` ends."""
        self.phases.append(phase)
        frontend = self._frontend
        known = phase.name in {"fill", "mix", "verify"}  # these phases are tracked by the model
        waiting: deque[tuple[Submitted, Step, float]] = deque()
        started = time.monotonic()

        def finish() -> None:
            request, step, since = waiting.popleft()
            frontend.wait([request])
            now = time.monotonic()
            if request.status != BLKIF_RSP_OKAY:
                raise XenbackendError(f"the disk answered {request.status} at sector {step.sector} ({phase.name})")
            if known:
                self._model.finish(step, request.status, request.data)
            take(step, request.data)
            phase.latencies.append(now - since)
            phase.moved += step.count * SECTOR
            phase.seconds = now - started
            self._progress(phase)

        for step in steps:
            if len(waiting) >= min(DEPTH, frontend.free() + len(waiting)):
                finish()
            request = frontend.submit(step.operation, step.sector, step.count, step.data)
            waiting.append((request, step, time.monotonic()))
        while waiting:
            finish()


def _compare(step: Step, data: bytes, before: dict[int, bytes]) -> None:
    if data != before[step.sector]:
        raise XenbackendError(f"sectors {step.sector} to {step.sector + step.count - 1} could not be put back")
