"""What disks the guests get and what is done below them, from one seed; the same seed makes the same plan.

Must not do any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

SECTORS = 8192  # of a guest's disk: 4 MiB, so that requests meet each other


@dataclass(frozen=True, slots=True)
class Disk:
    """One guest's disk, and how its frontend uses it."""

    chain: str
    other: str  # a chain with the same content, put in its place and back
    sectors: int = SECTORS
    protocol: str = "x86_64-abi"
    ring_order: int = 0
    queues: int = 1
    persistent: bool = True
    indirect: int = 0
    discard: bool = True

    @property
    def is_timed(self) -> bool:
        """False where a barrier may wait for a request that failed and is tried again after a second."""
        return "fault:" not in self.chain


Make = Callable[[str, Path], None]  # makes an image of a format


def disks(directory: Path, slow: Path, make: Make) -> list[Disk]:
    """Return eight disks, no two alike: images in memory (`directory`) and on a disk (`slow`), made by `make`."""

    def image(kind: str, name: str, place: Path) -> str:
        file = place / f"{name}.{kind}"
        make(kind, file)
        return f"{'aio' if kind == 'raw' else kind}:{file}"

    full = "fault:op=write,errno=ENOSPC,skip=99,every=701"  # the policy pauses and tries again: the guest sees no error
    bad = "fault:op=read,errno=EIO,skip=99,every=907"
    bases = {name: image(kind, name, place) for name, kind, place in (
        ("plain", "raw", directory), ("direct", "raw", slow), ("logged", "raw", directory), ("full", "raw", directory),
        ("bad", "raw", directory), ("vhd", "vhd", directory), ("qcow2", "qcow2", directory), ("old", "raw", slow),
    )}  # fmt: skip
    return [
        Disk(bases["plain"], f"log:|{bases['plain']}", queues=2),
        Disk(bases["direct"], f"log:|{bases['direct']}", ring_order=2, indirect=64),
        Disk(f"log:|{bases['logged']}", bases["logged"], persistent=False),
        Disk(f"{full}|{bases['full']}", bases["full"], queues=2, indirect=32),
        Disk(f"{bad}|{bases['bad']}", f"log:|{bases['bad']}"),
        Disk(f"log:|{bases['vhd']}", bases["vhd"], discard=False),
        Disk(bases["qcow2"], f"log:|{bases['qcow2']}", queues=2),
        Disk(bases["old"], f"delay:write=2ms|{bases['old']}", protocol="x86_32-abi", persistent=False),
    ]


ACTIONS = {  # with how often of a hundred
    "kill a worker": 48,
    "kill every worker": 16,
    "kill a worker twice": 6,
    "kill the service": 5,
    "kill both": 5,
    "stop a worker for a moment": 5,
    "replace the service": 3,
    "upgrade a worker": 4,
    "exchange a chain": 4,
    "pause and resume": 2,
    "xenstore goes away": 2,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done, to one of the guests' disks where it is to a disk, after a moment."""

    action: str
    guest: int
    after_s: float


def next_step(random: Random, guests: int, actions: dict[str, int]) -> Step:
    """Return the next step."""
    action = random.choices([*actions], [*actions.values()])[0]
    return Step(action, random.randrange(guests), random.random() ** 3 * 0.2)
