"""How one limit is shared by several disks: who gets how much of it, by what each could use.

Must not know a disk. What a disk says that it could use is not believed beyond its fair part: whoever says too much
gets no more than everybody who wants as much, and whoever says too little gets that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

FIRST = 1 / 16  # of a disk that was told nothing yet
_LEAST = 1 / 16  # of a fair part: for a disk that does nothing now, so that it can begin at once
_SPARE = 1.25  # times what a disk uses that is not held back: it may use more in a moment

M = TypeVar("M", bound=Hashable)


def wanted(used: float, *, is_held: bool, members: int) -> float:
    """Return what a disk could use of the limit: all of it where it was held back, else a little more than it used.

    What is no number that it can have used is nothing.
    """
    used = used if math.isfinite(used) else 0.0
    return 1.0 if is_held else min(1.0, max(_LEAST / members, _SPARE * used))


def divide(wishes: Mapping[M, float]) -> dict[M, float]:
    """Return the shares, 1 in all: a disk gets what it wishes, or as much as any other; the rest is for all alike.

    A wish that is no finite number is for nothing.
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

    What is taken from one is given to another with the step after, when the first one has heard of it: at no moment is
    more handed out than there is.
    """
    free = max(0.0, 1.0 - sum(now.values()))
    more = sum(max(0.0, aims[member] - share) for member, share in now.items())
    part = min(1.0, free / more) if more else 0.0
    return {member: min(share, aims[member]) + max(0.0, aims[member] - share) * part for member, share in now.items()}
