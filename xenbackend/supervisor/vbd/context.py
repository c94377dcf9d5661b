"""What every vbd of one service shares.

Must not hold anything that belongs to a single vbd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.vbd.last_chains import LastChains
from xenbackend.supervisor.xenstore.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """What all vbds share: the store, the loop with its clock, the workers, and so on."""

    store: Store
    loop: Reactor
    fleet: Fleet
    settings: Settings
    bus: Bus
    keeper: Keeper
    time: Callable[[], float]  # seconds since 1970
    ledger: Ledger
    last_chains: LastChains
