"""Random I/O on a frontend, every sector of it compared with a model of the disk.

Must not choose the seed: whoever calls prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.full_rings import KnownDisk
from xenbackend.blkif.abi import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
)
from xenbackend.rig.frontend import Frontend
from xenbackend.rig.guest_ring import Span, Submitted, random_spans, whole_spans
from xenbackend.rig.pattern import DiskModel, Step

ALL = (*[BLKIF_OP_READ, BLKIF_OP_WRITE] * 8, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD)
DIRECT = 8 * BLKIF_MAX_SEGMENTS_PER_REQUEST  # sectors


def make_model(
    seed: int, sectors: int, max_count: int = DIRECT, *, can_discard: bool = True, first: int = 0
) -> KnownDisk:
    """Return the model of a disk for every operation that it can do; `first` is its content, by default zeros."""
    operations = ALL if can_discard else tuple(each for each in ALL if each != BLKIF_OP_DISCARD)
    return KnownDisk(seed, sectors, Random(seed), operations=operations, max_count=max_count, first=first)


class Load:
    """Requests that are in flight, with what the model knows of them; it may stop anywhere and go on later."""

    def __init__(
        self,
        frontend: Frontend,
        model: DiskModel,
        patience_s: float = 10.0,
        on_answers: Callable[[Load], None] = lambda _: None,
    ) -> None:
        """Load a disk; an answer may take `patience_s` seconds, and `on_answers` is called when some have come."""
        self.begun = 0  # requests
        self.finished = 0
        self._frontend = frontend
        self._model = model
        self._patience_s = patience_s
        self._on_answers = on_answers
        self._pending: dict[Submitted, tuple[int, Step]] = {}  # with how many were begun before

    @property
    def settled(self) -> int:
        """How many requests were answered before the oldest that is not."""
        return next((number for number, _ in self._pending.values()), self.begun)

    def top_up(self, most: int = 1 << 30) -> int:
        """Fill the rings with up to `most` requests that the model asks for, and return how many there were."""
        count = 0
        while count < most and self._frontend.free() and (step := self._model.next_step()):
            self._pending[_submit(self._frontend, step, self._model.random)] = (self.begun, step)
            self.begun += 1
            count += 1
        return count

    def run(self, requests: int) -> None:
        """Keep the rings full until `requests` more were begun. Raises: WrongData and others."""
        while requests > 0:
            requests -= self.top_up(requests)
            self._finish_some()

    def finish(self) -> None:
        """Wait for all that is in flight. Raises: WrongData and others."""
        while self._pending:
            self._finish_some()

    def take(self) -> int:
        """Take the answers that are there, without waiting; return how many. Raises: WrongData and others."""
        return self._take(self._frontend.poll())

    def _finish_some(self) -> None:
        self._take(self._frontend.wait_for_any(self._patience_s))

    def _take(self, done: list[Submitted]) -> int:
        self.finished += len(done)
        for request in done:
            self._model.finish(self._pending.pop(request)[1], request.status or 0, request.data)
        if done:
            self._on_answers(self)
        return len(done)


def work(frontend: Frontend, model: DiskModel, requests: int) -> None:
    """Keep the rings full with what the model asks for, until `requests` are done. Raises: WrongData and others."""
    load = Load(frontend, model)
    load.run(requests)
    load.finish()


def read_all(frontend: Frontend, model: DiskModel, see: Callable[[bytes], object] = lambda _: None) -> None:
    """Compare the whole disk; `see` gets all that is in it, piece by piece. Raises: WrongData."""
    for sector in range(0, model.sectors, DIRECT):
        data = frontend.read(sector, min(DIRECT, model.sectors - sector))
        model.check(sector, data)
        see(data)


def _submit(frontend: Frontend, step: Step, random: Random) -> Submitted:
    operation = step.operation
    most = max(BLKIF_MAX_SEGMENTS_PER_REQUEST, frontend.facts.max_indirect)
    spans: list[Span] = whole_spans(step.count)
    if operation in (BLKIF_OP_READ, BLKIF_OP_WRITE) and random.random() < 0.3:
        chosen = random_spans(random, step.count)
        spans = chosen if len(chosen) <= most else spans
    if operation == BLKIF_OP_WRITE and len(spans) <= BLKIF_MAX_SEGMENTS_PER_REQUEST and random.random() < 0.02:
        operation = random.choice([BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE])
    return frontend.submit(operation, step.sector, step.count, step.data, spans=spans, push=random.random() < 0.2)
