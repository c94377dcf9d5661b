"""What a vbd's automaton takes in and what it answers: plain values.

Must not hold behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.spec import Spec


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
    """The worker process has ended, wanted or not; `sentence` says how.

    `has_progressed`: the guest got an answer since the last worker ended, or this one had lived for long.
    `chain`: the one that was in service at last, where it had just taken another one's place and could not say so.
    """

    sentence: str
    has_progressed: bool = False
    chain: str = ""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A worker that an earlier service started is there; it has been asked where it stands, by `report`.

    It may still have to answer the same question of a service that was gone again before it got to that.
    """

    report: int = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """An administrator wants the disk served on: after a pause, after workers that died one after the other."""


@dataclass(frozen=True, slots=True)
class Replace:
    """Another process is to serve the disk: the program is a newer one."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The time that the last `Limit` gave is over."""


@dataclass(frozen=True, slots=True)
class Called:
    """The toolstack's hotplug script has come, so the toolstack has seen InitWait; and no other backend has the vbd."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The service ends. The state is left as it is, for the next one.

    `leaves`: the worker goes on, and the next service takes it over; else it finishes what is in flight and closes.
    """

    leaves: bool = False


Event = (
    Seen | Postponed | Ended | Inherited | Resume | Replace | Expired | Called | Stop
    | messages.Standing | messages.Swapped | messages.Trouble
    | messages.Opened | messages.Failed | messages.Connected | messages.Halted | messages.Paused
    | messages.Disconnected | messages.Closed
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """Set keys of the backend's directory (None removes), in one transaction that first sees `state` unchanged."""

    keys: dict[str, str | None]
    state: XenbusState


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker and have it open the chain; `lost` says what a failed flush has lost, if one failed."""

    spec: Spec
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """Have the worker connect; answer `messages.Failed` where the frontend's keys cannot be.

    `can_discard` and `max_segments` (of an indirect request) are what the frontend was offered.
    `goes_on`: it is connected already, to an earlier worker.
    """

    can_discard: bool
    max_segments: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the worker."""

    message: messages.Disconnect | messages.Close | messages.Resume


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
