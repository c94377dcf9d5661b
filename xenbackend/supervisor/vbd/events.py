"""The events that a vbd's automaton takes and the actions that it returns, as plain values.

Must not hold behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.spec import Spec


@dataclass(frozen=True, slots=True)
class Seen:
    """Both ends as a fresh look found them. `keys` are the backend's directory's, None if that is gone.

    `has_left`: the guest was migrated to another place, and asks for nothing here any more.
    `has_moved`: its keys name other rings than those that are served; not looked at unless `Sight.must_compare`.
    """

    keys: dict[str, str] | None
    theirs: XenbusState
    has_left: bool = False
    has_moved: bool = False


@dataclass(frozen=True, slots=True)
class Postponed:
    """The rings cannot be joined yet: xenstore is away, or the kernel's backend has the vbd. A look follows."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker process has ended, as it was told or not; `sentence` says how.

    `has_progressed`: the guest has received an answer since the previous worker ended, or this one had lived long.
    `is_unfinished`: it had not left the rings, and may not have answered all requests that it had taken.
    `is_hasty`: many workers in a row have ended right after their start.
    `has_waited`: no worker was started, because the storage does not answer.
    """

    sentence: str
    has_progressed: bool = False
    is_unfinished: bool = False
    is_hasty: bool = False
    has_waited: bool = False


@dataclass(frozen=True, slots=True)
class Waits:
    """The opener waits for the storage of a file, or makes a key of a passphrase; with an empty name, no longer."""

    name: str
    makes_key: bool = False


@dataclass(frozen=True, slots=True)
class Inherited:
    """A worker that an earlier service started still runs; it has been asked where it stands."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Another chain is in service. The key ``params`` is to name it, if its value is still one of `stale_params`.

    It comes before the `Standing` or `Ended` that made it known.
    """

    stale_params: tuple[str, ...]
    chain: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The frontend's keys are not valid; the worker was not told to serve."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Resume:
    """An administrator wants the disk to be served again: after a pause, or after a series of dead workers."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """An administrator has put another chain in while there was no worker, and wants the disk served from it."""


@dataclass(frozen=True, slots=True)
class Replace:
    """Another process is to serve the disk, because the program is newer now."""


@dataclass(frozen=True, slots=True)
class Expired:
    """The time that the last `Limit` gave is over."""


@dataclass(frozen=True, slots=True)
class Called:
    """The toolstack's hotplug script has come, so the toolstack has seen InitWait; and no other backend has the vbd."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The service ends. Our state is left as it is, for the next service.

    `leaves`: the worker goes on, and the next service adopts it; else it finishes what is in flight and closes.
    `is_unfinished`: no worker has left the rings. If none serves now, one finishes what is in flight before the end.
    """

    leaves: bool = False
    is_unfinished: bool = False


Event = (
    Seen | Postponed | Ended | Inherited | Exchanged | Refused | Resume | Replaced | Replace | Expired | Called | Stop
    | Waits
    | messages.Standing  # only one that answers the last order, or a later one with the same number
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """Set keys of the backend's directory (None removes), in one transaction that first checks that it is the same one.

    state    the value that our state must still have
    params   the value that the key ``params`` must still have, if it is to be changed; else None
    mark     a key of ours that must still be there, which a node made anew does not have; None before one was seen
    """

    keys: dict[str, str | None]
    state: XenbusState
    params: str | None = None
    mark: str | None = None

    @property
    def offers_anew(self) -> bool:
        """Whether the vbd is offered to a frontend after an earlier one has used it, or may have."""
        is_offer = self.keys.get("state") == str(XenbusState.INIT_WAIT.value)
        return is_offer and self.state is not XenbusState.INITIALISING


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker and have it open the chain. `lost` says which flush failed, if one did.

    If the journal does not have that flush, it must be entered there before the worker gets the journal.
    """

    spec: Spec
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """Have the worker serve the rings; handle `Refused` if the frontend's keys are not valid.

    `can_discard` and `max_segments` (of an indirect request) are what the frontend was offered.
    `goes_on`: the frontend is connected already; an earlier worker served it.
    """

    can_discard: bool
    max_segments: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """Have the worker leave the rings, and keep the chain open."""


@dataclass(frozen=True, slots=True)
class Close:
    """Have the worker close the chain and end; `hands_over`: a successor continues on the same rings.

    `goes_on`: the frontend stays connected, and a later service serves it.
    """

    hands_over: bool = False
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the worker; `sentence` says why, and comes back in `Ended`.

    `is_breach`: it broke the protocol; else it took too long, or is not needed.
    """

    sentence: str
    is_breach: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """Have `Expired` come after `seconds`, unless another `Limit` comes first; None: never.

    `quiet_s`: earlier, once the guest has made no request for so many seconds, and none is in flight.
    """

    seconds: float | None
    quiet_s: float | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """Forget the vbd: it has gone and nothing of it is left, or this service has finished with it."""


Action = Write | Start | Join | Leave | Close | Kill | Limit | Forget
