"""Quantities that every room uses: sizes, durations, times of day, rounding.

Must not know a device, a protocol or a file.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

SECTOR = 512  # bytes: the unit of sector numbers on the ring and in images, whatever `sector-size` and the medium say
PAGE = 4096  # bytes; Xen's page on every architecture that runs blkif
_SIZE = re.compile(r"(\d+)([kmgtp]?)(i?b)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m)?", re.IGNORECASE | re.ASCII)
_SIZE_STEP = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_DURATION_STEP = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0}


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as ``64M``, ``1GiB`` or ``512`` means; suffixes are powers of 1024.

    Raises: ValueError, with a sentence for the operator.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with K, M, G, T or P, as in 64M")
    return int(match[1]) * _SIZE_STEP[match[2].lower()]


def format_size(size: int) -> str:
    """Return `size` in bytes for a reader: ``64 MiB``, ``1.5 GiB``, ``512 B``."""
    for suffix, step in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= step:
            return f"{size / step:.4g} {suffix}"
    return f"{size} B"


def parse_duration(text: str) -> float:
    """Return the seconds that a text such as ``5ms``, ``2s`` or ``1.5`` means; a number without a suffix is seconds.

    Raises: ValueError, with a sentence for the operator.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write a number with ns, us, ms, s or m, as in 5ms")
    return float(match[1]) * _DURATION_STEP[(match[2] or "").lower()]


def format_duration(seconds: float) -> str:
    """Return a duration for a reader: ``12 us``, ``3.4 ms``, ``2.5 s``."""
    for suffix, per_second in (("us", 1e6), ("ms", 1e3)):
        if seconds * per_second < 999.5:
            return f"{seconds * per_second:.3g} {suffix}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def format_time(seconds: float, precision: str = "seconds") -> str:
    """Return a time for a reader, by the clock of this host, with its zone: ``2026-11-30T12:00:00+01:00`` (ISO 8601).

    Args:
        seconds: since 1970.
        precision: ``seconds``, ``milliseconds`` or ``microseconds``.
    """
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(timespec=precision)
