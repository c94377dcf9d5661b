"""What a vbd's automaton takes in and what it answers: plain values.

Must not hold behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend import control
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor.spec import Spec


@dataclass(frozen=True, slots=True)
class Seen:
    """Both ends as a fresh look found them; `keys` of the backend's directory, None when it is gone."""

    keys: dict[str, str] | None
    theirs: XenbusState


@dataclass(frozen=True, slots=True)
class Postponed:
    """The frontend's keys could not be read because xenstore is away; a look follows when it is back."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker process has ended, wanted or not; `sentence` says how."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The time that the last `Limit` gave is over."""


@dataclass(frozen=True, slots=True)
class Called:
    """The toolstack's hotplug script has come, so the toolstack has seen InitWait; and no other backend has the vbd."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The service ends: finish what is in flight and close; leave the state as it is, unless the disk is paused."""


Event = (
    Seen | Postponed | Ended | Expired | Called | Stop
    | control.Opened | control.Failed | control.Connected | control.Halted | control.Paused
    | control.Disconnected | control.Closed
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """Set keys of the backend's directory (None removes), in one transaction that first sees `state` unchanged."""

    keys: dict[str, str | None]
    state: XenbusState


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker and have it open the chain."""

    spec: Spec


@dataclass(frozen=True, slots=True)
class Join:
    """Read the frontend's keys and have the worker connect; answer `control.Failed` for keys that cannot be.

    `can_discard` and `max_segments` (of an indirect request) are what the frontend was offered.
    """

    can_discard: bool
    max_segments: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the worker."""

    message: control.Disconnect | control.Close


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the worker; `sentence` says why, and comes back in `Ended`."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Limit:
    """Send `Expired` after `seconds` unless another `Limit` comes first; None: never."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Forget:
    """The vbd has gone and nothing of it is left."""


Action = Write | Start | Join | Tell | Kill | Limit | Forget
