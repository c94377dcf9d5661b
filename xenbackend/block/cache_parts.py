"""Parts of the driver of a cache: its modes, limits of its sizes, and requests of its own.

Must not send a request.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.block.beside import check_block
from xenbackend.block.cache_map import WAYS
from xenbackend.block.overtaken import Copy
from xenbackend.block.request import PENDING, Request
from xenbackend.units import format_size

MAX_SLOTS = 1 << 24
MOST = 128 << 10  # bytes of a request whose blocks get slots
PATIENCE = 16  # errors of FILE, one after the other, before nothing more is put into it
READ, WRITETHROUGH, WRITEBACK = MODES = "read", "writethrough", "writeback"


def check_sizes(size: int, block: int) -> None:
    """Check the sizes of a cache and of its blocks, in bytes. Raises: ValueError with a sentence."""
    check_block(block)
    least, most = max(1 << 20, WAYS * block), MAX_SLOTS * block
    if not least <= size <= most:
        bounds = f"{format_size(least)} to {format_size(most)}"
        raise ValueError(f"size is {format_size(size)}; with this block it must be {bounds}")


def parse_mode(text: str) -> str:
    """Parse the option `mode`. Raises: ValueError with a sentence."""
    if text not in MODES:
        raise ValueError(f"{text!r} is not one of {', '.join(MODES)}")
    return text


class Own(Request):
    """A request made by a cache. `done` is called when it comes back.

    cache    the cache that made it, since requests of a cache above may come back from the layer below, too
    memory   its data, if it goes to the layer below: the disk from `offset` on
    copy     tells whether these data are still current
    slots    the slots that its blocks will have, by block
    block    of a write to FILE, its block; of a read from FILE, the slot
    left     writes to FILE with its data that are under way
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
        """Return a new request without memory."""
        own = cls()
        own.op, own.offset, own.length, own.status, own.done, own.cache = op, offset, length, PENDING, done, cache
        return own
