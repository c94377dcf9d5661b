"""Divides one limit among several disks, by how much of it each could use.

Must not know a disk. A disk's own figures are not trusted beyond its fair part: one that exaggerates gets no more than
every other disk that wants as much, and one that understates gets that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

FIRST = 1 / 16  # the share of a disk that was not told one yet
_LEAST = 1 / 16  # of a fair part, for an idle disk, so that it can begin at once
_SPARE = 1.25  # times its use, for a disk that is not held back, so that it can use more at once

M = TypeVar("M", bound=Hashable)


def wanted(used: float, *, is_held: bool, members: int) -> float:
    """Return how much of the limit a disk could use: all if it was held back, else a little more than it used.

    A `used` that is not finite counts as 0.
    """
    used = used if math.isfinite(used) else 0.0
    return 1.0 if is_held else min(1.0, max(_LEAST / members, _SPARE * used))


def divide(wishes: Mapping[M, float]) -> dict[M, float]:
    """Return the shares, whose sum is 1: each disk gets its wish, or as much as any other; the rest is divided equally.

    A wish that is not finite counts as 0.
    """
    bounded = {member: max(0.0, wish) if math.isfinite(wish) else 0.0 for member, wish in wishes.items()}
    shares: dict[M, float] = {}
    left = 1.0
    for place, (member, wish) in enumerate(sorted(bounded.items(), key=lambda each: each[1])):
        shares[member] = min(wish, left / (len(wishes) - place))
        left -= shares[member]
    return {member: share + left / len(shares) for member, share in shares.items()}


def step(now: Mapping[M, float], aims: Mapping[M, float]) -> dict[M, float]:
    """Return the next shares on the way from `now` to `aims`, of the same disks.

    What is taken from one disk is given to another only in a later step, when the first one has been told. So the sum
    of the shares in use never exceeds 1.
    """
    free = max(0.0, 1.0 - sum(now.values()))
    more = sum(max(0.0, aims[member] - share) for member, share in now.items())
    part = min(1.0, free / more) if more else 0.0
    return {member: min(share, aims[member]) + max(0.0, aims[member] - share) * part for member, share in now.items()}
