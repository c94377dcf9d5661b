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
    """Both ends as a fresh look found them; `keys` of the backend's directory, None when it is gone.

    `has_left`: the guest was migrated to where it runs now, and asks for nothing here any more.
    """

    keys: dict[str, str] | None
    theirs: XenbusState
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Postponed:
    """The frontend's keys could not be read because xenstore is away; a look follows when it is back."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker process has ended, wanted or not; `sentence` says how.

    `has_progressed`: the guest got an answer since the last worker ended, or this one had lived for long.
    `is_unfinished`: it had not taken leave of the guest, and may have left requests that it had taken.
    `is_hasty`: so did many before it, right after their start.
    `has_waited`: the storage did not answer, which is no fault of a worker's; or none was started for that.
    """

    sentence: str
    has_progressed: bool = False
    is_unfinished: bool = False
    is_hasty: bool = False
    has_waited: bool = False


@dataclass(frozen=True, slots=True)
class Waits:
    """The opener waits for the storage of a file, or makes a key of a passphrase; where the name is empty, no more."""

    name: str
    makes_key: bool = False


@dataclass(frozen=True, slots=True)
class Inherited:
    """A worker that an earlier service started is there; it has been asked where it stands."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Another chain is in service, and the key ``params`` is to name it where it still is one of `stale_params`.

    Comes before the `Standing` or `Ended` from which it was known.
    """

    stale_params: tuple[str, ...]
    chain: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The frontend's keys cannot be; the worker was not told to serve."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Resume:
    """An administrator wants the disk served on: after a pause, after workers that died one after the other."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """An administrator has put another chain in while there was no worker, and wants the disk served from that."""


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
    `is_unfinished`: no worker has taken leave of the guest. Where none serves it now, one does before the end.
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
    """Set keys of the backend's directory (None removes), in one transaction that first sees that it is the same one.

    state    what our state must still be
    params   what the key of that name must still be, where it is among the keys; else None
    mark     a key of ours that must still be there: in a node made anew it is not; None before one was seen
    """

    keys: dict[str, str | None]
    state: XenbusState
    params: str | None = None
    mark: str | None = None

    @property
    def offers_anew(self) -> bool:
        """Whether a frontend is offered the vbd that an earlier one has used, or may have."""
        is_offer = self.keys.get("state") == str(XenbusState.INIT_WAIT.value)
        return is_offer and self.state is not XenbusState.INITIALISING


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker and have it open the chain; `lost` says what a failed flush has lost, if one failed.

    A journal that does not know of that flush has to be told before the worker gets it.
    """

    spec: Spec
    lost: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """Have the worker serve; answer `Refused` where the frontend's keys cannot be.

    `can_discard` and `max_segments` (of an indirect request) are what the frontend was offered.
    `goes_on`: it is connected already, to an earlier worker.
    """

    can_discard: bool
    max_segments: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """Have the worker let go of the rings, and keep the chain open."""


@dataclass(frozen=True, slots=True)
class Close:
    """Have the worker close the chain and end; `hands_over`: another one goes on with the rings."""

    hands_over: bool = False


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the worker; `sentence` says why, and comes back in `Ended`.

    `is_breach`: it said what cannot be; else it took too long.
    """

    sentence: str
    is_breach: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """Send `Expired` after `seconds` unless another `Limit` comes first; None: never.

    `quiet_s`: already after so long without a request of the guest's.
    """

    seconds: float | None
    quiet_s: float | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """The vbd has gone and nothing of it is left."""


Action = Write | Start | Join | Leave | Close | Kill | Limit | Forget
