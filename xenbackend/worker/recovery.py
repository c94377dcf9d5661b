"""Takes a ring over from a worker that died at any instruction: finishes its answers, finds its unanswered requests.

Must not execute a request again, nor look at anything but the ring's response producer and the journal.

The order of writes, as the head of the journal's module has it, leaves four cases for each request:

    FREE          answered; nothing is left to do
    COMPLETING    executed. If the response producer covers it, it was published, and its slot may hold a new request
                  by now: only the journal is corrected. Otherwise its response is written again and published.
    INFLIGHT      executed in part, wholly or not at all: `recover` returns it, to be executed again. Reads, writes,
                  flushes and discards may be repeated; the guest keeps the pages until it gets the answer.
    not taken     it lies in the ring from `consumed` on

The frontend is notified once afterwards, as the worker may have died before its last notification. A recovery may
itself be killed anywhere, and repeated. The journal is trusted; the ring only where it agrees with the journal.
"""

from __future__ import annotations

from xenbackend.blkif.abi import BLKIF_OP_INDIRECT, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.blkif.ring import BackRing, RingOverflow
from xenbackend.journal import (
    ANSWER_EOPNOTSUPP,
    ANSWER_ERROR,
    ANSWER_OKAY,
    BATCH,
    REQ_CONS,
    RSP_PROD,
    RingJournal,
)

_STATUS = {ANSWER_OKAY: BLKIF_RSP_OKAY, ANSWER_ERROR: BLKIF_RSP_ERROR, ANSWER_EOPNOTSUPP: BLKIF_RSP_EOPNOTSUPP}


def recover(ring: BackRing, journal: RingJournal) -> list[int]:
    """Finish the answers that a predecessor had begun; return the entries of unanswered requests, in ring order.

    Afterwards `ring` stands where the predecessor stood, and new requests may be taken.

    Raises: RingOverflow, if the frontend has changed the response producer, which is ours; nothing was written then.
    """
    taken = journal.taken()
    answering = journal.answering()
    ring.go_on_from(taken, journal.words[RSP_PROD])
    published = ring.published()
    if published > len(answering):
        raise RingOverflow(f"the frontend moved our response index by {published}, of {len(answering)} answers")
    journal.words[REQ_CONS] = taken
    if answering:
        ring.go_on_from(taken, ring.answered + published)
        journal.words[RSP_PROD] = ring.answered
        for number, entry, answer in answering[published:]:
            guest_id, operation = _who_asked(ring, journal, entry)
            ring.put_response(number, guest_id, operation, _STATUS[answer])
        ring.publish(answering[-1][0] + 1)
        journal.words[RSP_PROD] = ring.answered
    return [entry for _, entry in journal.unanswered()]


def _who_asked(ring: BackRing, journal: RingJournal, entry: int) -> tuple[int, int]:
    """Return the id and the operation that a response carries; for an indirect request, the inner operation."""
    block, place = divmod(entry, BATCH)
    start = place * journal.slot_size
    slot = journal.block_slots(block)[start : start + journal.slot_size]
    operation, second, _, guest_id, *_ = ring.layout.one.unpack(slot)
    return guest_id, second if operation == BLKIF_OP_INDIRECT else operation
