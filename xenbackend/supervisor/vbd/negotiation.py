"""What a frontend is offered, or was offered by an earlier service: converted to keys, and from keys.

Must not know how far a worker is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from xenbackend.blkif.features import (
    MAX_SEGMENTS,
    MAXIMA,
    Disk,
    Frontend,
    Limits,
    parse_frontend,
    publish_at_connect,
    publish_at_probe,
)
from xenbackend.blkif.handshake import XenbusState, parse_state
from xenbackend.errors import GuestError
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Join
from xenbackend.supervisor.vbd.spec import Spec
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX
from xenbackend.units import SECTOR

STATUS = "hotplug-status"
LOST = "flush-failed"
EXPORT = "physical-device-path"
_ERROR = "hotplug-error"
PRIVATE = frozenset({_ERROR, LOST, EXPORT})  # may name files of the host; a guest may read all other keys
_SEGMENTS = "feature-max-indirect-segments"
_DIGITS = 20  # of a number with 64 bits


def keys_for(
    keys: Mapping[str, str],
    limits: Limits,
    *,
    disk: Disk | None = None,
    export: str | None = None,
    problem: str = "",
    flush_failed: str = "",
    has_come: bool = True,
) -> dict[str, str | None]:
    """Return the keys that a backend's directory should have, without our state; None removes a key.

    Args:
        keys: what the directory holds now.
        limits: the limits of what we offer.
        disk: the disk as the guest sees it, None while it is not open.
        export: where a device model finds the disk, as `export_url` returns it.
        problem: why there is no disk to offer, empty if there is one.
        flush_failed: which flush failed, empty if none did.
        has_come: whether the toolstack's script has come, so that it may be answered.
    """
    wanted: dict[str, str | None] = {**publish_at_probe(limits), LOST: flush_failed[:SENTENCE_MAX] or None}
    if parse_state(keys.get("state")) in (XenbusState.CONNECTED, XenbusState.CLOSING) and _SEGMENTS in keys:
        del wanted[_SEGMENTS]  # offered by an earlier service with other limits, and the frontend goes by that
    if problem:
        wanted |= {_ERROR: problem[:SENTENCE_MAX], STATUS: "error"}
    elif disk is not None:
        wanted |= {**publish_at_connect(disk), _ERROR: None, STATUS: "connected", EXPORT: export}
    if not has_come:
        wanted.pop(STATUS, None)
    return wanted


def disk_of(top: messages.LayerFacts, spec: Spec | None, keys: Mapping[str, str]) -> Disk:
    """Return the disk that a guest sees of a chain with this top layer, as the toolstack wants it."""
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


def shrinkage(top: messages.LayerFacts, keys: Mapping[str, str]) -> str:
    """Return why a chain with this top layer cannot serve a frontend that goes by `keys`; empty: it can.

    A frontend writes to any of the sectors that it was told of, in units of the sector size that it was told.
    """
    told = keys.get("sectors", ""), keys.get("sector-size", "")
    if not all(each.isascii() and each.isdecimal() and len(each) <= _DIGITS for each in told):
        return ""  # it was told nothing
    size, sector_size = int(told[0]) * SECTOR, int(told[1])
    if top.size < size:
        return (
            f"{top.text} has {top.size} bytes, and the guest was told {size}: a disk that has shrunk is not served; "
            "restore its size, then run `xenbackend resume`"
        )
    if top.sector_size != sector_size:
        return (
            f"{top.text} has sectors of {top.sector_size} bytes, and the guest was told {sector_size}; give it such "
            "sectors again, then run `xenbackend resume`"
        )
    return ""


def export_url(kind: str, path: str) -> str | None:
    """Return ``physical-device-path`` for an export's socket: a URL for QEMU, or the path for kind vbd3; None: none."""
    if not path or kind == "vbd3":
        return path or None
    return f"nbd+unix:///?socket={path}"


def join_of(keys: Mapping[str, str], limits: Limits, *, goes_on: bool) -> Join:
    """Return the action that joins the rings of a frontend that goes by `keys`."""
    segments = keys.get(_SEGMENTS, "")
    is_number = segments.isascii() and segments.isdecimal() and len(segments) <= len(str(MAX_SEGMENTS))
    return Join(
        can_discard=keys.get("feature-discard") == "1",
        max_segments=min(int(segments), MAX_SEGMENTS) if is_number else limits.max_segments,
        goes_on=goes_on,
    )


def connect_of(chosen: Frontend, join: Join) -> messages.Connect:
    """Return the message that has a worker serve the rings as a frontend has chosen."""
    return messages.Connect(
        chosen.protocol,
        _rings(chosen),
        chosen.persistent,
        can_discard=join.can_discard,
        max_segments=join.max_segments,
        goes_on=join.goes_on,
    )


def has_moved(read: Callable[[str], str | None], agreed: messages.Connect) -> bool:
    """Return whether a frontend's keys, of which `read` returns one, name other rings than those that were agreed.

    Nonsense names none, and cannot take back what was agreed.
    """
    try:
        chosen = parse_frontend(read, MAXIMA)
    except GuestError:
        return False
    return _rings(chosen) != agreed.rings


def _rings(chosen: Frontend) -> list[messages.RingParameters]:
    return [messages.RingParameters(list(ring.grefs), ring.event_channel) for ring in chosen.rings]
