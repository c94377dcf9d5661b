"""A write barrier, lowered to operations that layers know: flush, write, flush, each alone in the chain.

Must not submit anything itself: the engine submits one step after another, each once nothing is in flight, and holds
later requests back.

Source: io/blkif.h, BLKIF_OP_WRITE_BARRIER: all earlier writes are done before it, no later one begins before it is
done. A flush that carries data is served the same way, which promises more than it asks for.
"""

from __future__ import annotations

from xenbackend.blkif.request import RingRequest
from xenbackend.block.request import PENDING, Op, Request


class Barrier:
    """A barrier being carried out. `behind`: records taken from the ring after it, which wait until it is done."""

    def __init__(self, record: RingRequest, write: Request | None, behind: list[RingRequest]) -> None:
        """Lower `record`; `write` is its data's request, or None for an empty barrier."""
        self.record = record
        self.behind = behind
        self.status = 0
        self.step: Request | None = None  # the one that the chain has now
        self._steps = [self._flush()]
        if write is not None:
            write.tag = self
            self._steps += [write, self._flush()]

    def next_step(self) -> Request | None:
        """Return the next request to submit, or None when all are done or one has failed."""
        self.step = self._steps.pop(0) if self._steps and not self.status else None
        return self.step

    def end_step(self, status: int) -> None:
        """Take back the current step, which ended with `status`."""
        self.step = None
        self.status = status

    def answer(self) -> Request:
        """Return the record's own request, its status set to the barrier's outcome."""
        request: Request = self.record.request
        request.tag = self.record
        request.status = self.status
        return request

    def _flush(self) -> Request:
        flush = Request(self)
        flush.op = Op.FLUSH
        flush.status = PENDING
        return flush
