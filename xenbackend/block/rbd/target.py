"""The syntax of an image's name: ``pool/image`` or ``pool/namespace/image``, and ``@snapshot`` after either.

Must not look anything up. Source: rbd(8), "image-spec", "snap-spec".
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from xenbackend.errors import DriverError

MAX_NAME = 1024  # bytes of each part; Ceph's own limits are below that


@dataclass(frozen=True, slots=True)
class Target:
    """An image, or one of its snapshots."""

    pool: str
    namespace: str  # empty: the pool's own
    image: str
    snapshot: str = ""  # empty: the image itself

    def __str__(self) -> str:
        return "/".join(each for each in (self.pool, self.namespace, self.image) if each) + (
            f"@{self.snapshot}" if self.snapshot else ""
        )


def parse_target(text: str) -> Target:
    """Parse the name of an image or snapshot. Raises: ValueError, with a sentence."""
    for word in ("id", "conf"):
        if f":{word}=" in text:
            raise ValueError(f"{text!r} is in QEMU's notation; here options follow commas: {_corrected(text)}")
    name, at, snapshot = text.partition("@")
    parts = name.split("/")
    if not 2 <= len(parts) <= 3:
        raise ValueError(f"{text!r} is neither POOL/IMAGE nor POOL/NAMESPACE/IMAGE")
    if not all(parts) or (at and not snapshot):
        raise ValueError(f"{text!r} has an empty name in it")
    if "@" in snapshot or "/" in snapshot:
        raise ValueError(f"{text!r}: after the @ write the name of one snapshot, without / and @")
    for part in (*parts, snapshot):
        if "\0" in part or "\n" in part or len(part.encode(errors="surrogateescape")) > MAX_NAME:
            raise ValueError(f"{text!r} has a name in it that no pool or image can have")
    pool, *between, image = parts
    return Target(pool, between[0] if between else "", image, snapshot)


def parse_name(name: str) -> str:
    """Check the name of a snapshot, and return it. Raises: DriverError, with a sentence."""
    try:
        return parse_target(f"pool/image@{name}").snapshot
    except ValueError:
        raise DriverError(f"{name!r} is not a valid name for a snapshot", errno=errno.EINVAL) from None


def _corrected(text: str) -> str:
    image, *options = text.split(":")
    return f"rbd:{','.join([image, *options])}"
