"""The crash journal of one vbd: where each request in flight lies, in memory that outlives the worker.

Must not know a socket, a ring or a request's meaning. The supervisor makes the memory and keeps it; a worker writes it
while it serves; a successor reads it to learn what its predecessor had taken and not answered.

Requests are taken in batches of up to BATCH from one ring. A batch gets a free block of BATCH entries side by side, so
that one copy moves all its slots out of the shared ring: the entry is the only copy that anybody parses.

    page 0                counters (`xenbackend.counters`)
    page 1                header: MAGIC, VERSION, then what was agreed with the frontend, as JSON with its length before
    then per ring         one page of words:  0 req_cons   1 rsp_prod   2 the ring's entries
                          a word per block:   first request number << 8 | requests in the block; 0 = none
                          a word per entry:   0 = not answered, else response number << 2 | answer
                          a copy of its slot per entry
                          a copy of its indirect segments per entry

Every word is 64 bits, aligned, and written by one store; request and response numbers count on without wrapping, and
their low 32 bits are the ring's indices. So an entry's state needs no word of its own:

    INFLIGHT    its block's word covers it and its answer word is 0
    COMPLETING  its answer word holds a response number >= rsp_prod: the response may or may not be published
    FREE        its answer word holds a response number < rsp_prod, or its block's word does not cover it

Order of writes, which recovery rests on (SIGKILL between any two of them loses nothing and repeats nothing):

    take     0 block word zeroed: nobody may see its old requests with the new answer words
             1 slots copied, answer words of the batch zeroed      2 block word: the batch is INFLIGHT     3 req_cons
    answer   4 responses into their slots    5 answer words: COMPLETING        6 ring's rsp_prod, fence
             7 rsp_prod here: FREE           8 the frontend is notified if it asked

4 and 5 may change places: nobody looks at those slots before 6, and what was in them had been copied.

A block word whose requests lie at or beyond req_cons means death between 2 and 3: they were taken, nothing had been
done about them.
"""

from __future__ import annotations

import json
from struct import Struct
from typing import Any

from xenbackend.units import PAGE

MAGIC = 0x4A4B4C42_4E4558  # "XENBLKJ"
VERSION = 1
BATCH = 16  # requests taken and answered together; of a ring of 32, 8 cost a tenth more, 32 make both sides wait
MAX_ENTRIES = 512  # slots of the largest ring
MAX_RINGS = 8
SLOT = 112  # bytes of the larger layout's slot
SEGMENTS = 256 * 8  # bytes of indirect segments

ANSWER_OKAY, ANSWER_ERROR, ANSWER_EOPNOTSUPP = 1, 2, 3  # the two low bits of an answer word

REQ_CONS, RSP_PROD, RING_ENTRIES = 0, 1, 2  # words of a ring's first page

_ENTRIES = MAX_ENTRIES * BATCH  # every block may hold just one request
_BLOCKS_AT = PAGE
_ANSWERS_AT = _BLOCKS_AT + MAX_ENTRIES * 8
_SLOTS_AT = _ANSWERS_AT + _ENTRIES * 8
_SEGMENTS_AT = _SLOTS_AT + _ENTRIES * SLOT
_RING_SIZE = _SEGMENTS_AT + _ENTRIES * SEGMENTS
_RINGS_AT = 2 * PAGE
_HEADER = Struct("QQQ")  # magic, version, bytes of JSON

SIZE = _RINGS_AT + MAX_RINGS * _RING_SIZE  # bytes; the memory is sparse, only pages in use exist


class RingJournal:
    """One ring's part of the journal.

    words    u64: REQ_CONS, RSP_PROD, RING_ENTRIES
    blocks   u64 per block
    answers  u64 per entry; entry = block * BATCH + place in the block
    slots    bytes; `slot_size` per entry
    """

    def __init__(self, memory: memoryview, ring: int, slot_size: int) -> None:
        """Look at ring number `ring` of a journal of SIZE bytes; `slot_size` is the layout's, at most SLOT bytes."""
        start = _RINGS_AT + ring * _RING_SIZE
        self.words = memory[start : start + PAGE].cast("Q")
        self.blocks = memory[start + _BLOCKS_AT : start + _ANSWERS_AT].cast("Q")
        self.answers = memory[start + _ANSWERS_AT : start + _SLOTS_AT].cast("Q")
        self.slot_size = slot_size
        self._slots = memory[start + _SLOTS_AT : start + _SEGMENTS_AT]
        self._segments = memory[start + _SEGMENTS_AT : start + _RING_SIZE]

    def begin(self, entries: int, index: int) -> None:
        """Start afresh for a ring of `entries` slots whose both sides stand at `index`."""
        self.blocks[:] = memoryview(bytes(self.blocks.nbytes)).cast("Q")
        self.words[REQ_CONS] = self.words[RSP_PROD] = index
        self.words[RING_ENTRIES] = entries

    def block_slots(self, block: int) -> memoryview:
        """Return the copies of a block's slots: BATCH * slot_size bytes."""
        start = block * BATCH * SLOT
        return self._slots[start : start + BATCH * self.slot_size]

    def segments(self, entry: int) -> memoryview:
        """Return the copy of an entry's indirect segments: SEGMENTS bytes."""
        return self._segments[entry * SEGMENTS : (entry + 1) * SEGMENTS]

    def release(self) -> None:
        """Let go of the memory."""
        for view in (self.words, self.blocks, self.answers, self._slots, self._segments):
            view.release()


def write_header(memory: memoryview, agreed: dict[str, Any]) -> None:
    """Write what was agreed with the frontend, for a successor. Raises: ValueError when it is too long."""
    text = json.dumps(agreed).encode()
    if len(text) > PAGE - _HEADER.size:
        raise ValueError(f"{len(text)} bytes do not fit into the journal's header")
    start = PAGE + _HEADER.size
    memory[start : start + len(text)] = text
    _HEADER.pack_into(memory, PAGE, MAGIC, VERSION, len(text))


def read_header(memory: memoryview) -> dict[str, Any] | None:
    """Return what was agreed, or None where no worker has connected yet."""
    magic, version, length = _HEADER.unpack_from(memory, PAGE)
    if magic != MAGIC or version != VERSION or length > PAGE - _HEADER.size:
        return None
    agreed: dict[str, Any] = json.loads(bytes(memory[PAGE + _HEADER.size : PAGE + _HEADER.size + length]))
    return agreed
