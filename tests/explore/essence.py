"""The relevant part of a ring's and a journal's memory, so that states that differ only in leftovers count as one.

Must not leave out anything that a worker, a successor or a guest may look at: it follows the docstring of
`xenbackend.journal` and what an honest guest reads. Searches of small rings do not use it.
"""

from __future__ import annotations

from typing import Any

from tests.explore.worker import Memory
from xenbackend.blkif.abi import X86_64
from xenbackend.journal import REQ_CONS, RSP_PROD

_MASK = 0xFFFF_FFFF


def of_journal(memory: Memory, entries: int) -> tuple[Any, ...]:
    """Return what a successor uses: the counters, and for each block the requests that have no published answer."""
    size, consumed, published = X86_64.slot_size, memory.words[REQ_CONS], memory.words[RSP_PROD]
    blocks: list[Any] = []
    for block, word in enumerate(memory.blocks):
        count = word & 0xFF
        live = []
        for place, entry in enumerate(range(block * entries, block * entries + count)):
            answer = memory.answers[entry]
            if not answer or answer >> 2 >= published:
                live.append((place, answer, memory.copies[entry * size : (entry + 1) * size]))
        blocks.append((word, *live) if live or (word >> 8) + count > consumed else None)
    return consumed, published, *blocks


def of_ring(memory: Memory, taken: int, entries: int) -> tuple[Any, ...]:
    """Return the slots that will be read: requests not counted as taken, and answers that the guest has not taken."""
    size = X86_64.slot_size
    places = [*range(memory.words[REQ_CONS] & _MASK, _from(memory.words[REQ_CONS], memory.req_prod))]
    places += range(taken & _MASK, _from(taken, memory.rsp_prod))
    slots = {place % entries for place in places}
    return (
        memory.req_prod,
        memory.rsp_prod,
        *[(slot, memory.slots[slot * size : (slot + 1) * size]) for slot in sorted(slots)],
    )


def _from(begin: int, end: int) -> int:
    """Return the end of a range between two indices, not wrapped to 32 bits."""
    return (begin & _MASK) + (end - begin & _MASK)
