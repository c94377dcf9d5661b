"""The crash journal of one vbd: the state of each request in flight, in memory that outlives the worker.

Must not know a socket, a ring or the meaning of a request, nor trust what it reads: a worker that a guest has taken
over may write anything at any time. Every reader here takes a bounded time, and returns None, 0 or an empty list if the
memory holds something that no worker of ours writes.

The supervisor creates the sealed memory (`kernel.memfd`) and keeps it. A worker writes it while it serves. A successor
reads it to learn which requests its predecessor had taken and not answered.

Requests are taken in batches of up to BATCH from one ring. A batch gets a free block of BATCH adjacent entries, so that
one copy moves all its slots out of the shared ring. The entry is the only copy that is ever parsed.

    page 0                counters (`xenbackend.counters`)
    page 1                words:  0 MAGIC   1 VERSION   2 which copy of AGREED is valid, 0 = none
                                  3 the errno of a flush that failed: the image may have lost writes (`poison`)
    pages 2-17            AGREED: two copies of a JSON text, each preceded by its length
    then per ring         one page of words:  0 req_cons   1 rsp_prod   2 the ring's entries
                          a word per block:   first request number << 8 | requests in the block; 0 = none
                          a word per entry:   0 = not answered, else response number << 2 | answer
                          for each entry, a copy of its slot
                          unused space: the last release kept copies of indirect segments there

Every word has 64 bits, is aligned, and is written by one store. Request and response numbers never wrap; their low 32
bits are the ring's indices. So an entry's state needs no word of its own:

    INFLIGHT    its block's word covers it and its answer word is 0
    COMPLETING  its answer word holds a response number >= rsp_prod: the response may or may not be published
    FREE        its answer word holds a response number < rsp_prod, or its block's word does not cover it

Order of writes, on which recovery relies (SIGKILL between any two of them loses nothing and repeats nothing):

    take     0 block word zeroed: no reader may see its old requests with the new answer words
             1 slots copied, answer words of the batch zeroed      2 block word: the batch is INFLIGHT     3 req_cons
    answer   4 responses into their slots    5 answer words: COMPLETING        6 ring's rsp_prod, fence
             7 rsp_prod here: FREE           8 the frontend is notified if it asked

4 and 5 may change places: the frontend does not read those slots before 6, and their former content has been copied.

If the requests of a block word lie at or beyond req_cons, the worker died between 2 and 3: the requests were taken, but
nothing had been done with them. `xenbackend.worker.recovery` applies these rules.

The journal holds no copies of indirect segments. A successor reads them again from the guest's pages, which the guest
may not change before the request is answered, and checks them again.

AGREED holds the worker's chain and, while it serves, what it has agreed with the frontend
(`protocol.messages.Agreed`). It is written to the copy that is not valid, which one store then makes the valid one.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from xenbackend.note import Note
from xenbackend.units import PAGE

VERSION = 3  # `supervisor.vbd.former` reads version 2, which the last release wrote
BATCH = 16  # requests taken and answered together; with a ring of 32, 8 cost a tenth more, 32 make both ends wait
MAX_ENTRIES = 512  # slots of the largest ring
MAX_RINGS = 8
SLOT = 112  # bytes of the larger layout's slot
SEGMENTS = 256 * 8  # bytes of indirect segments

ANSWER_OKAY, ANSWER_ERROR, ANSWER_EOPNOTSUPP = 1, 2, 3  # the two low bits of an answer word

REQ_CONS, RSP_PROD, RING_ENTRIES = 0, 1, 2  # words of a ring's first page

_ENTRIES = MAX_ENTRIES * BATCH  # in the worst case, every block holds only one request
# In bytes: where the rings' parts begin, the size of each part, and (SCRATCH_AT) where its unused space begins.
RINGS_AT = 18 * PAGE
_BLOCKS_AT = PAGE
_ANSWERS_AT = _BLOCKS_AT + MAX_ENTRIES * 8
_SLOTS_AT = _ANSWERS_AT + _ENTRIES * 8
SCRATCH_AT = _SLOTS_AT + _ENTRIES * SLOT
RING_SIZE = SCRATCH_AT + _ENTRIES * SEGMENTS
_POISON = 3  # word of page 1
_MAX_ERRNO = 4095

SIZE = RINGS_AT + MAX_RINGS * RING_SIZE  # bytes; the memory is sparse, only pages in use exist


class RingJournal:
    """One ring's part of the journal.

    words    u64: REQ_CONS, RSP_PROD, RING_ENTRIES
    blocks   u64 per block
    answers  u64 per entry; entry = block * BATCH + place in the block
    slots    bytes; `slot_size` per entry
    """

    def __init__(self, memory: memoryview, ring: int, slot_size: int) -> None:
        """Open the part of ring number `ring` in a journal of SIZE bytes; `slot_size` is the layout's, at most SLOT."""
        start = RINGS_AT + ring * RING_SIZE
        self.words = memory[start : start + PAGE].cast("Q")
        self.blocks = memory[start + _BLOCKS_AT : start + _ANSWERS_AT].cast("Q")
        self.answers = memory[start + _ANSWERS_AT : start + _SLOTS_AT].cast("Q")
        self.slot_size = slot_size
        self._slots = memory[start + _SLOTS_AT : start + SCRATCH_AT]

    def begin(self, entries: int, index: int) -> None:
        """Reset this part for a ring of `entries` slots whose requests and responses both continue from `index`."""
        self.blocks[:] = memoryview(bytes(self.blocks.nbytes)).cast("Q")
        self.words[REQ_CONS] = self.words[RSP_PROD] = index
        self.words[RING_ENTRIES] = entries

    def unanswered(self) -> list[tuple[int, int]]:
        """Return (request number, entry) of every request that is INFLIGHT, in the order of the ring."""
        return sorted((first + place, entry) for first, place, entry, answer in self._entries() if not answer)

    def answering(self) -> list[tuple[int, int, int]]:
        """Return (response number, entry, answer) of every request that is COMPLETING, in the order of the answers."""
        rsp_prod = self.words[RSP_PROD]
        return sorted(
            (answer >> 2, entry, answer & 3)
            for _, _, entry, answer in self._entries()
            if answer >> 2 >= rsp_prod and answer
        )

    def taken(self) -> int:
        """Return the number of the first request that was not taken, even if the worker died before REQ_CONS moved."""
        return max([self.words[REQ_CONS], *(first + place + 1 for first, place, _, _ in self._entries())])

    def _entries(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (first request of its block, place in it, entry, answer word) of each entry that holds a request."""
        for block, word in enumerate(self.blocks):
            count = word & 0xFF
            for place in range(count if count <= BATCH else 0):
                entry = block * BATCH + place
                yield word >> 8, place, entry, self.answers[entry]

    def block_slots(self, block: int) -> memoryview:
        """Return the copies of a block's slots: BATCH * slot_size bytes."""
        start = block * BATCH * SLOT
        return self._slots[start : start + BATCH * self.slot_size]

    def release(self) -> None:
        """Release the views of the memory."""
        for view in (self.words, self.blocks, self.answers, self._slots):
            view.release()


# The longest chain that fits into a xenstore value also fits here, whatever its bytes.
AGREED = Note(PAGE, 2, (2 * PAGE, 10 * PAGE), 8 * PAGE, VERSION)


def poison(memory: memoryview, code: int) -> None:
    """Note for all successors that a flush failed with errno `code`; 0 clears the note."""
    _words(memory)[_POISON] = code


def poisoned(memory: memoryview) -> int:
    """Return the errno of the flush that failed, 0 if none did."""
    code: int = _words(memory)[_POISON]
    return code if code <= _MAX_ERRNO else errno.EIO


def progress(memory: memoryview) -> list[int]:
    """Return a number per ring that grows whenever its oldest request in flight is answered, or a new one is taken."""
    return activity(memory)[0]


def activity(memory: memoryview) -> tuple[list[int], bool]:
    """Return the list of `progress`, and whether any request is in flight."""
    found, is_busy = [], False
    for ring in range(MAX_RINGS):
        journal = RingJournal(memory, ring, SLOT)
        if journal.words[RING_ENTRIES]:
            waiting = journal.unanswered()
            is_busy |= bool(waiting)
            found.append(waiting[0][0] if waiting else journal.words[REQ_CONS])
        journal.release()
    return found, is_busy


def _words(memory: memoryview) -> memoryview:
    return memory[PAGE : 2 * PAGE].cast("Q")
