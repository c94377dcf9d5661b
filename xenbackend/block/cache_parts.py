"""What the driver of a cache is made of: its modes, and its own requests.

Must not send anything.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.block.beside import check_block
from xenbackend.block.cache_map import WAYS
from xenbackend.block.overtaken import Copy
from xenbackend.block.request import PENDING, Request
from xenbackend.units import format_size

MAX_SLOTS = 1 << 24
READ, WRITETHROUGH, WRITEBACK = MODES = "read", "writethrough", "writeback"


def check_sizes(size: int, block: int) -> None:
    """See that a cache may be so large, in bytes. Raises: ValueError with a sentence."""
    check_block(block)
    least, most = max(1 << 20, WAYS * block), MAX_SLOTS * block
    if not least <= size <= most:
        bounds = f"{format_size(least)} to {format_size(most)}"
        raise ValueError(f"size is {format_size(size)}; with this block it must be {bounds}")


def parse_mode(text: str) -> str:
    """Return a mode. Raises: ValueError with a sentence."""
    if text not in MODES:
        raise ValueError(f"{text!r} is not one of {', '.join(MODES)}")
    return text


class Own(Request):
    """A request of ours. `done` is called when it is back.

    cache    whose it is, of one that goes down: another cache may lie above
    memory   what it is done with: the disk from `offset` on
    copy     of its blocks: whether they are current still
    slots    that they are to have, by block
    block    of a request to FILE: that, or for a read the slot
    left     how many of those are under way
    """

    __slots__ = ("block", "cache", "copy", "done", "left", "memory", "slots")

    cache: object
    done: Callable[[Own], None]
    memory: memoryview
    copy: Copy
    slots: dict[int, int]
    block: int
    left: int

    @classmethod
    def make(cls, cache: object, op: int, offset: int, length: int, done: Callable[[Own], None]) -> Own:
        """Return a new one, without memory."""
        own = cls()
        own.op, own.offset, own.length, own.status, own.done, own.cache = op, offset, length, PENDING, done, cache
        return own
