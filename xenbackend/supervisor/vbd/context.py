"""What every vbd of one service shares.

Must not hold anything of one vbd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.xenstore.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """The store, the workers, and the rest."""

    store: Store
    fleet: Fleet
    settings: Settings
    bus: Bus
    keeper: Keeper
    now: Callable[[], float]  # seconds of a clock that only goes forward
    time: Callable[[], float]  # seconds since 1970
