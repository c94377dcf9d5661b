"""What a frontend is offered of a disk, and what it was offered by an earlier service: from keys, and to keys.

Must not know how far a worker is.
"""

from __future__ import annotations

from collections.abc import Mapping

from xenbackend.blkif.features import MAX_SEGMENTS, Disk, Frontend, Limits
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Join
from xenbackend.supervisor.vbd.spec import Spec

SEGMENTS = "feature-max-indirect-segments"


def disk_of(top: messages.LayerFacts, spec: Spec | None, keys: Mapping[str, str]) -> Disk:
    """Return the disk that a chain with this top layer is to a guest, as the toolstack wants it."""
    return Disk(
        size=top.size,
        sector_size=top.sector_size,
        read_only=top.read_only or (spec is not None and spec.read_only),
        can_flush=top.can_flush,
        can_discard=top.can_discard and keys.get("discard-enable") != "0",
        discard_granularity=top.discard_granularity,
        discard_alignment=top.discard_alignment,
        physical_sector_size=top.physical_sector_size,
        cdrom=spec is not None and spec.cdrom,
        removable=spec is not None and spec.removable,
    )


def export_url(kind: str, path: str) -> str | None:
    """Return what ``physical-device-path`` says of the socket of an export: QEMU's URL, for kind vbd3 the path."""
    if not path or kind == "vbd3":
        return path or None
    return f"nbd+unix:///?socket={path}"


def join_of(keys: Mapping[str, str], limits: Limits, *, goes_on: bool) -> Join:
    """Return how the rings are joined of a frontend that goes by what stands in `keys`."""
    segments = keys.get(SEGMENTS, "")
    is_number = segments.isascii() and segments.isdecimal() and len(segments) <= len(str(MAX_SEGMENTS))
    return Join(
        can_discard=keys.get("feature-discard") == "1",
        max_segments=min(int(segments), MAX_SEGMENTS) if is_number else limits.max_segments,
        goes_on=goes_on,
    )


def connect_of(chosen: Frontend, join: Join) -> messages.Connect:
    """Return the message that has a worker serve what a frontend has chosen."""
    return messages.Connect(
        chosen.protocol,
        [messages.RingParameters(list(ring.grefs), ring.event_channel) for ring in chosen.rings],
        chosen.persistent,
        can_discard=join.can_discard,
        max_segments=join.max_segments,
        goes_on=join.goes_on,
    )
