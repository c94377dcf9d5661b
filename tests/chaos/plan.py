"""Plans a run from a seed: the guests' disks, the steps, the orders. The same seed gives the same plan.

Must not carry out any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

from tests import luks_images

SECTORS = 8192  # of a guest's disk: 4 MiB, so that requests meet each other
LUKS = {"luks": "aio", "qcow2.luks": "qcow2"}  # kinds of encrypted images, and which driver is below `luks:`


@dataclass(frozen=True, slots=True)
class Disk:
    """One guest's disk, and how its frontend uses it."""

    chain: str  # at first
    other: str  # over the same source; `set` takes its filters out and puts them in, and those that only `chain` has
    sectors: int = SECTORS
    protocol: str = "x86_64-abi"
    ring_order: int = 0
    queues: int = 1
    persistent: bool = True
    indirect: int = 0
    discard: bool = True
    first: int = 0  # generation of its sectors at first (`rig.pattern`); unless it is 0, the image below is raw

    @property
    def is_timed(self) -> bool:
        """False if a barrier may wait for a request that failed and is tried again after a second."""
        return "fault:" not in self.chain


Make = Callable[[str, Path], None]  # makes an image of a format


def disks(directory: Path, slow: Path, make: Make) -> list[Disk]:
    """Return eight disks, no two alike: images in memory (`directory`) and on a disk (`slow`), made by `make`.

    Among their chains is each filter: those that hold data, or a key, all the time, the others now and then.
    """

    def image(kind: str, name: str, place: Path) -> str:
        file = place / f"{name}.{kind}"
        make(kind, file)
        if kind in LUKS:
            layer, driver = f"luks:key={luks_images.key_file(file.with_suffix('.key'))}|", LUKS[kind]
        else:
            layer, driver = "", "aio" if kind == "raw" else kind
        return f"{layer}{driver}:{file}"

    full = "fault:op=write,errno=ENOSPC,skip=99,every=701"  # the policy pauses and tries again: the guest sees no error
    bad = "fault:op=read,errno=EIO,skip=99,every=907"
    bases = {name: image(kind, name, place) for name, kind, place in (
        ("deep", "qcow2.luks", directory), ("summed", "raw", slow), ("logged", "luks", directory),
        ("full", "raw", directory), ("bad", "raw", directory), ("vhd", "vhd", directory), ("qcow2", "qcow2", directory),
        ("own", "raw", slow),
    )}  # fmt: skip
    group = "throttle:iops=1500,bps=80M,group=two"
    deep = f"cache:{slow}/deep.cache,size=1M,mode=writeback|{bases['deep']}"
    summed = f"checksum:{slow}/summed.sums|{bases['summed']}"
    late = f"cache:{directory}/bad.cache,size=2M,mode=writeback,destage=8M|{bad}|offset:start=1M|{bases['bad']}"
    own = f"cow:{slow}/own.cow,block=8K|{bases['own']}"
    return [
        Disk(f"{group}|{deep}", f"{group}|log:|{deep}"),
        Disk(summed, f"{group}|log:|{summed}", ring_order=2, indirect=64),
        Disk(
            f"log:|{bases['logged']}",
            f"cache:{slow}/logged.cache,size=1M,mode=writethrough|log:|{bases['logged']}",
            persistent=False,
        ),
        Disk(f"{full}|cow:|{bases['full']}", f"log:|{full}|cow:|{bases['full']}", queues=2, indirect=32, first=1),
        Disk(late, f"log:|{late}", sectors=SECTORS - 2048),
        Disk(f"log:|{bases['vhd']}", f"cache:{slow}/vhd.cache,size=1M|log:|{bases['vhd']}", discard=False),
        Disk(bases["qcow2"], f"readahead:size=64K|log:|{bases['qcow2']}", queues=2),
        Disk(own, f"delay:write=2ms|{own}", protocol="x86_32-abi", persistent=False, first=1),
    ]


ORDERS = "administrators order"
ACTIONS = {  # with their frequencies, in percent
    "kill a worker": 38,
    "kill every worker": 13,
    "kill a worker twice": 5,
    "kill the service": 6,
    "kill both": 5,
    "stop a worker for a moment": 4,
    "replace the service": 3,
    ORDERS: 22,
    "xenstore goes away": 4,
}
KILL_SERVER, STOP_SERVER, REFUSE = "kill a server", "stop a server for a moment", "the cluster refuses a worker"
LINK_FAULT = "a link fails"
ENGINE_ACTIONS = {KILL_SERVER: 9, STOP_SERVER: 6, REFUSE: 3, LINK_FAULT: 12}  # as above, for an engine's own actions


@dataclass(frozen=True, slots=True)
class Step:
    """One action, after a moment; `guest` is the number of its disk, if it is about a disk."""

    action: str
    guest: int
    after_s: float


def next_step(random: Random, guests: int, actions: dict[str, int]) -> Step:
    """Return the next step."""
    action = random.choices([*actions], [*actions.values()])[0]
    return Step(action, random.randrange(guests), random.random() ** 3 * 0.2)


# What is ordered ----------------------------------------------------------------------------------------------------

VERBS = {"set": 34, "snapshot": 12, "resize": 8, "pause": 12, "policy": 9, "upgrade": 14, "command": 11}
UNNAMED_VERBS = {"keep": 1, "drop": 4}  # besides, for a disk whose `cow:` has an unnamed file
_REFUSED = 2  # weight of an order that is to be refused
MOST_SNAPSHOTS = 4  # of one disk: each makes its guest slower, for good
POLICIES = ("read=retry 3 every 1s", "read=retry 4 every 0.5s", "write=retry 9 every 0.1s")  # harmless to all disks
_MOSTLY = 0.7  # share of the filters that may be missing, and that a chain has all the same
_BREAKING = ("fault:", "delay:", "throttle:", "log:")  # filters that may break or delay requests, or make a file
_BUSY = 0.4  # share of the disks that orders are given about in a round


def holds(layer: str) -> bool:
    """Return whether a filter must stay: it has data that are nowhere else, or knows how to find or read them."""
    return layer.startswith(("cow:", "luks:", "offset:")) or is_write_back(layer)


def is_write_back(layer: str) -> bool:
    """Return whether a layer is a cache that destages."""
    return layer.startswith("cache:") and "mode=writeback" in layer


def has_unnamed(chain: str) -> bool:
    """Return whether what the guest writes goes to a file without a name."""
    return any(each.startswith("cow:") and not each.startswith("cow:/") for each in chain.split("|"))


def content(chain: str) -> str:
    """Return a chain that has the content of this one, and reads it without delay."""
    return "|".join(each for each in chain.split("|") if not each.startswith(_BREAKING))


class Manner(Enum):
    """How a client waits for the answer to its order."""

    PATIENT = "waits"
    SHORT = "waits for a moment, and asks what became of it"
    GONE = "goes away"


@dataclass(frozen=True, slots=True)
class Wish:
    """One order of one client: `request` lacks verb and disk; it is given after `after_s`, and waits `wait_s`."""

    verb: str
    request: dict[str, Any]
    manner: Manner
    after_s: float
    wait_s: float


def next_wishes(random: Random, disk: Disk, chain: str, image: Path, *, may_grow: bool) -> list[list[Wish]]:
    """Return the orders about a disk in one round: for each of one or two administrators a list, given in order.

    `chain` is in service before, `image` does not exist yet; without `may_grow` a snapshot is to be refused.
    """
    weights = VERBS | (UNNAMED_VERBS if has_unnamed(chain) else {})
    if any(is_write_back(each) or each.startswith(("cow:", "checksum:")) for each in disk.other.split("|")):
        weights["snapshot"] = _REFUSED  # of the image below would miss what is above, or has other sums
    verbs = random.choices([*weights], [*weights.values()], k=random.choice((1, 2, 2)))
    if verbs.count("pause") > 1:
        verbs.pop()  # only the administrator who paused a disk resumes it
    return [[_wish(random, verb, _request(random, verb, disk, chain, image, may_grow=may_grow))] for verb in verbs]


def is_ordered_of(random: Random) -> bool:
    """Return whether orders are given about one more disk."""
    return random.random() < _BUSY


def _wish(random: Random, verb: str, request: dict[str, Any]) -> Wish:
    manner = random.choices([*Manner], [5, 3, 2])[0]
    return Wish(verb, request, manner, random.random() ** 2 * 0.1, random.random() ** 2 * 0.2)


def _request(random: Random, verb: str, disk: Disk, chain: str, image: Path, *, may_grow: bool) -> dict[str, Any]:
    *_, source = layers = chain.split("|")
    match verb:
        case "set":
            return _set(random, disk, layers)
        case "snapshot" if source.startswith("rbd:"):
            return {"file": f"@{image.stem if may_grow else ''}"}
        case "snapshot":
            return {"file": str(image) if may_grow else source.partition(":")[2].partition(",")[0]}
        case "keep":
            return {"file": str(image)}
        case "policy":
            return {"policy": random.choice(POLICIES)}
        case "command":
            return {"layer": "log", "command": "peek"}
    return {}


def _set(random: Random, disk: Disk, layers: list[str]) -> dict[str, Any]:
    """Return another chain over the same source, with filters or without; sometimes one that must be refused."""
    *filters, _ = max(disk.chain.split("|"), disk.other.split("|"), key=len)
    filters = filters if "log:" in filters else ["log:", *filters]
    held = iter([each for each in layers[:-1] if holds(each)])  # as it is now: an unnamed file may have got a name
    chosen = []
    for each in filters:
        if holds(each):
            chosen.append(_vary(random, next(held)))
        elif random.random() < _MOSTLY:
            chosen.append(each)
    match random.choices(["other", "dry", "bottom", "missing"], [17, 1, 1, 1])[0]:
        case "dry":
            return {"chain": "|".join([*chosen, layers[-1]]), "dry_run": True}
        case "bottom":
            return {"chain": "|".join([*chosen, "null:4M"])}
        case "missing":
            return {"chain": "|".join([*chosen, "aio:/nonexistent/chaos"])}
    return {"chain": "|".join([*chosen, layers[-1]])}


def _vary(random: Random, layer: str) -> str:
    """Return a layer, for a cache that destages with any rate."""
    if not is_write_back(layer):
        return layer
    return layer.partition(",destage=")[0] + random.choice(("", ",destage=8M", ",destage=32M"))
