"""Changes of the product that the ring fuzzer must find: each takes one defence out.

Must not be imported but where one is wanted: they stay until the process ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xenbackend.blkif.request import Decoder
from xenbackend.blkif.ring import BackRing
from xenbackend.kernel.ports import GRANT_OK
from xenbackend.rig.host import RigGrants
from xenbackend.worker.connection import EventChannel
from xenbackend.worker.grants import PersistentGrants
from xenbackend.worker.queue import Queue


def no_range() -> None:
    """Let requests of several segments lie anywhere."""
    Decoder._check_range = lambda *_: None


def any_status() -> None:
    """Take each status of a copy for success."""
    real = RigGrants.copy
    RigGrants.copy = lambda *arguments: [GRANT_OK] * len(real(*arguments))


def padding() -> None:
    """Leave in a response what its slot had."""

    def put_response(ring: Any, place: int, guest_id: int, operation: int, status: int) -> None:
        at = ring.places[place & (ring.size - 1)]
        before = bytes(ring.pages[at + 9 : at + 10])
        ring.write_response(ring.pages, at, guest_id, operation, status)
        ring.pages[at + 9 : at + 10] = before

    BackRing.put_response = put_response


def two_answers() -> None:
    """Count an answer that was not given."""
    real = Queue._publish
    Queue._publish = lambda queue, answered: real(queue, answered + (answered % 64 == 63))


def stays_mapped() -> None:
    """Forget to unmap pages."""

    def close(grants: Any) -> None:
        grants._mappings.clear()
        grants._copied.close()

    PersistentGrants.close = close
    RigGrants.close = lambda _: None


def no_overflow() -> None:
    """Take as many requests as a producer index says, whatever there is room for."""
    BackRing.available = lambda ring: min(ring.size, (ring._index[0] - ring.consumed) & 0xFFFFFFFF)


def read_only_is_not_looked_at() -> None:
    """Let a guest alter a disk that is read-only."""
    real = Decoder.__init__

    def begin(self: Any, *arguments: Any, **more: Any) -> None:
        real(self, *arguments, **{**more, "read_only": False})

    Decoder.__init__ = begin


def keeps_events() -> None:
    """Do not hear a ring again once it was served."""
    EventChannel.rearm = lambda _: None


WRONG: dict[str, Callable[[], None]] = {
    change.__name__.replace("_", "-"): change
    for change in (
        no_range, any_status, padding, two_answers, stays_mapped, no_overflow, read_only_is_not_looked_at, keeps_events,
    )
}  # fmt: skip
