"""The xenstore keys by which backend and frontend agree: those that we publish, and the frontend's answers.

Must not talk to xenstore: the caller passes a function that reads a key.

Source: io/blkif.h, "Backend XenBus Nodes" and "Frontend XenBus Nodes"; if frontends differ from the header, comments
say what Linux does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.blkif.abi import LAYOUTS, MAX_RING_ORDER, NATIVE, VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE
from xenbackend.errors import GuestError
from xenbackend.units import SECTOR

MAX_QUEUES = 8
MAX_SEGMENTS = 256  # 1 MiB; IOV_MAX is 1024
_QUEUES, _ORDER = IN_PLURAL = ("multi-queue-num-queues", "ring-page-order")  # Linux omits them if they are 1 and 0
_MAX_U32 = 0xFFFF_FFFF
_PROTOCOLS = {**{name: name for name in LAYOUTS}, "arm-abi": NATIVE.protocol}


class BadFrontend(GuestError):
    """The frontend's keys are missing or not valid."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that we offer to a frontend."""

    max_queues: int = 4
    max_ring_order: int = MAX_RING_ORDER
    max_segments: int = MAX_SEGMENTS


MAXIMA = Limits(MAX_QUEUES, MAX_RING_ORDER, MAX_SEGMENTS)  # the largest limits that we support


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk as a frontend sees it; sizes in bytes."""

    size: int
    sector_size: int
    read_only: bool
    can_flush: bool
    can_discard: bool
    discard_granularity: int = 0
    discard_alignment: int = 0
    cdrom: bool = False
    removable: bool = False
    physical_sector_size: int = 0  # 0: not known; then it is published as `sector_size`


@dataclass(frozen=True, slots=True)
class FrontendRing:
    """One ring as the frontend offers it."""

    grefs: list[int]
    event_channel: int


@dataclass(frozen=True, slots=True)
class Frontend:
    """What the frontend chose; `protocol` is a key of `abi.LAYOUTS`."""

    protocol: str
    rings: list[FrontendRing]
    persistent: bool


def publish_at_probe(limits: Limits) -> dict[str, str]:
    """Return the keys that must be written before state InitWait, in which the frontend reads them."""
    return {
        "max-ring-page-order": str(limits.max_ring_order),
        "multi-queue-max-queues": str(limits.max_queues),
        "feature-max-indirect-segments": str(limits.max_segments),
        "feature-persistent": "1",
    }


def publish_at_connect(disk: Disk) -> dict[str, str]:
    """Return the keys that must be written before state Connected.

    `sectors` counts 512-byte sectors, as the header has required since 2024 and Linux has always done.
    """
    info = VDISK_CDROM * disk.cdrom | VDISK_REMOVABLE * disk.removable | VDISK_READONLY * disk.read_only
    keys = {
        "sectors": str(disk.size // SECTOR),
        "sector-size": str(disk.sector_size),
        "physical-sector-size": str(max(disk.sector_size, disk.physical_sector_size)),
        "info": str(info),
        "feature-flush-cache": str(int(disk.can_flush)),
        "feature-barrier": str(int(disk.can_flush)),
        "feature-discard": str(int(disk.can_discard)),
    }
    if disk.can_discard:
        keys["discard-granularity"] = str(disk.discard_granularity or disk.sector_size)
        keys["discard-alignment"] = str(disk.discard_alignment)
        keys["discard-secure"] = "0"
    return keys


def parse_frontend(read: Callable[[str], str | None], limits: Limits) -> Frontend:
    """Return what the frontend chose. `read` returns the value of a key below the frontend's directory, or None.

    If there is no `protocol`, the native one is used (as in Linux blkback; tapback uses x86_32). A feature is present
    if its value is 1, and absent for any other value.

    Raises: BadFrontend.
    """
    wanted = read("protocol")
    protocol = NATIVE.protocol if wanted is None else _PROTOCOLS.get(wanted)
    if protocol is None:
        raise BadFrontend(
            f"the frontend's protocol {_shown(wanted)} is unknown; the known ones are {', '.join(_PROTOCOLS)}"
        )
    queues = _number(read, _QUEUES, 1, limits.max_queues, default=1)
    order = _number(read, _ORDER, 0, limits.max_ring_order, default=0)
    # With one queue the keys lie in the frontend's own directory: Linux uses "queue-N/" only for two or more queues.
    prefixes = [f"queue-{queue}/" for queue in range(queues)] if queues > 1 else [""]
    rings = [_parse_ring(read, prefix, order) for prefix in prefixes]
    return Frontend(protocol=protocol, rings=rings, persistent=read("feature-persistent") == "1")


def _parse_ring(read: Callable[[str], str | None], prefix: str, order: int) -> FrontendRing:
    names = [f"ring-ref{page}" for page in range(1 << order)]
    # Frontends that write an order of 0 use either name for their page; like Linux blkback, accept both.
    if order == 0 and (read(_ORDER) is None or read(prefix + "ring-ref0") is None):
        names = ["ring-ref"]
    grefs = [_number(read, prefix + name, 0, _MAX_U32) for name in names]
    return FrontendRing(grefs=grefs, event_channel=_number(read, prefix + "event-channel", 0, _MAX_U32))


def _number(read: Callable[[str], str | None], key: str, least: int, most: int, default: int | None = None) -> int:
    """Return the value of a key as a number from `least` to `most`, `default` if it is missing. Raises: BadFrontend."""
    text = read(key)
    if text is None:
        if default is None:
            raise BadFrontend(f"the frontend has not written {key}")
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= most):
        raise BadFrontend(f"the frontend's {key} is {_shown(text)}; it must be a number from {least} to {most}")
    return int(text)


def _shown(text: str | None) -> str:
    """Return a guest's text, shortened and with control characters escaped."""
    return ascii((text or "")[:40])
