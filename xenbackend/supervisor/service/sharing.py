"""Divides limits that several disks share: looks once a second at what each uses, and tells each its share.

Must not trust a worker: it counts in a page of its own, which gets it no more than its fair part (`block.shares`). One
that does not reply is told nothing more until it does, and the others get their shares all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from xenbackend import counters
from xenbackend.block import shares
from xenbackend.block.drivers.throttle import Throttle
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.messages import Command, Reply
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.paths import VbdPath

TICK_S = 1.0
_SAME = 0.01  # relative difference below which two shares are the same

Key = tuple[VbdPath, int]  # a disk, and the place of a layer in its chain


@dataclass
class _Member:
    """A layer of a disk: its share, what it had counted at the last look, and whether it owes a reply."""

    vbd: Vbd
    share: float = shares.FIRST
    held: int = 0
    spent_ms: int = 0
    is_asked: bool = False

    def wish(self, counted: Mapping[str, int], members: int) -> float:
        """Return how much of the limit it could use, judging by what it has counted since the last look."""
        held, spent_ms = counted.get("held", 0), counted.get("spent_ms", 0)
        is_held = held > self.held or counted.get("waiting", 0) > 0
        used = max(0, spent_ms - self.spent_ms) / (1000 * TICK_S)  # a successor may count from 0
        self.held, self.spent_ms = held, spent_ms
        return shares.wanted(used, is_held=is_held, members=members)

    def tell(self, layer: int, counted: Mapping[str, int]) -> None:
        """Tell it its share, unless it has that already."""
        if self.is_asked or abs(counted.get("share_ppm", 0) / 1e6 - self.share) < _SAME * self.share:
            return
        self.is_asked = True
        self.vbd.link.ask(Command(str(layer), "share", [f"{self.share:.6f}"]), self._heard)

    def _heard(self, _reply: Reply) -> None:
        self.is_asked = False


class Sharing:
    """All groups of disks of one service that share a limit."""

    def __init__(self, loop: Reactor, vbds: Mapping[VbdPath, Vbd]) -> None:
        self._loop = loop
        self._vbds = vbds
        self._members: dict[str, dict[Key, _Member]] = {}  # by group
        self._timer = loop.timer(self.look)

    def look(self) -> None:
        """Hand out the shares of all groups, now and every TICK_S."""
        self._timer.set(self._loop.now() + TICK_S)
        found: dict[str, dict[Key, dict[str, int]]] = {}
        for path, vbd in self._vbds.items():
            for place, group in _groups_of(vbd.chain_in_service()):
                page, layers = vbd.counters_page(), vbd.device.layers
                if page is not None and place < len(layers):  # else it keeps its share until it is served again
                    counted = counters.figures(page, [each.figures for each in layers])[place]
                    found.setdefault(group, {})[path, place] = counted
        former, self._members = self._members, {}
        for group, layers_of in found.items():
            members = self._members[group] = {}
            for key in layers_of:
                vbd, known = self._vbds[key[0]], former.get(group, {}).get(key)
                members[key] = known if known is not None and known.vbd is vbd else _Member(vbd)
            _hand_out(members, layers_of)


def _hand_out(members: Mapping[Key, _Member], counted: Mapping[Key, Mapping[str, int]]) -> None:
    """Tell each member of one group its share."""
    wishes = {key: each.wish(counted[key], len(members)) for key, each in members.items()}
    now = {key: each.share for key, each in members.items()}
    for key, share in shares.step(now, shares.divide(wishes)).items():
        members[key].share = share
        members[key].tell(key[1], counted[key])


@lru_cache(maxsize=1024)
def _groups_of(chain: str) -> tuple[tuple[int, str], ...]:
    """Return place and group of each layer of a chain that shares its limits."""
    try:
        layers = parse_chain(chain).layers
    except ConfigError:
        return ()
    options = ((place, each.options) for place, each in enumerate(layers))  # a third party's may have a `group`, too
    return tuple((place, each.group) for place, each in options if isinstance(each, Throttle.Options) and each.group)
