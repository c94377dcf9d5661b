"""Remarks about layers in an order that makes little sense, though it works.

Must not refuse a chain: its author may have reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xenbackend.block.cache_parts import WRITEBACK

if TYPE_CHECKING:
    from xenbackend.block.spec import LayerSpec

_BELOW: dict[tuple[str, str], str] = {  # (the upper driver, one anywhere below it): the sentence
    ("cache", "luks"): "cache above luks keeps plain text in its file; put luks above cache to have that encrypted, "
    "too",
    ("cache", "throttle"): "throttle below cache limits only what the cache has not; put it above cache to limit the "
    "guest",
    ("cache writeback", "throttle"): "throttle below a cache with mode=writeback limits what the cache has not, and "
    "what is written only when no more may be dirty; put it above cache to limit the guest",
    ("cache writeback", "log"): "log below a cache with mode=writeback sees a write when that goes below, which is "
    "later; put it above cache to know what changes",
    ("cache", "cache"): "cache above cache keeps everything twice",
    ("checksum", "readahead"): "readahead below checksum holds what is not verified yet; above checksum it saves "
    "verifying it again, too",
    ("cow", "throttle"): "throttle below cow limits only what is read of the image, and nothing that is written; "
    "put it above cow to limit the guest",
    ("cow", "log"): "log below cow sees no write, because they go to cow's file; put it above cow to know what changes",
    ("cow", "null"): "null below cow reads as zeros: a new image of its own does the same without a layer",
    ("cow", "luks"): "cow above luks keeps what the guest writes in its file as plain text; put luks above cow to have "
    "that encrypted, too",
    ("luks", "luks"): "luks above luks encrypts twice, and takes twice the time",
    ("luks", "readahead"): "readahead below luks holds what is still encrypted; above luks it saves decrypting it, too",
    ("readahead", "throttle"): "throttle below readahead limits what is read ahead, not what the guest reads",
    ("throttle", "throttle"): "two throttles follow each other: one that has the limits of both does the same",
}
# The same, for a lower driver directly below the upper one only
_NEXT: dict[tuple[str, str], str] = {
    ("offset", "offset"): "two offsets follow each other: one whose start is the sum does the same, and is faster",
}


def words_of(layers: Sequence[LayerSpec]) -> list[str]:
    """Return the layers in the form for `remarks`: the driver's name, and a mode that makes a difference."""
    modes = [(each.driver.name, getattr(each.options, "mode", "")) for each in layers]
    return [f"{name} {mode}" if mode == WRITEBACK else name for name, mode in modes]


def remarks(drivers: Sequence[str]) -> list[str]:
    """Return a sentence for each odd order among a chain's drivers, which are as from `words_of`, the top one first."""
    found = []
    for place, upper in enumerate(drivers):
        for lower in (each.partition(" ")[0] for each in drivers[place + 1 :]):
            known = [each for each in ((upper, lower), (upper.partition(" ")[0], lower)) if each in _BELOW]
            found += [_BELOW[each] for each in known[:1]]
        found += [_NEXT[upper, lower] for lower in drivers[place + 1 : place + 2] if (upper, lower) in _NEXT]
    return list(dict.fromkeys(found))
