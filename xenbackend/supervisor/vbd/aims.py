"""What a vbd should look like: the keys and the state of the backend's directory, and the worker's goal.

Must not change anything. It derives them from what was seen, what is known of the worker, and why it may not serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import STEPS, Step, XenbusState
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Join
from xenbackend.supervisor.vbd.negotiation import disk_of, export_url, join_of, keys_for
from xenbackend.supervisor.vbd.phase import ATTACHED, USABLE, Goal, Phase
from xenbackend.supervisor.vbd.reasons import Reason, Reasons
from xenbackend.supervisor.vbd.sight import Sight
from xenbackend.supervisor.vbd.spec import Spec

_S = XenbusState
_JOINED = (_S.CONNECTED, _S.CLOSING)  # our states in which a frontend may have rings that were served
_GOALS = {
    Step.WAIT: Goal.OPEN, Step.OFFER: Goal.OPEN, Step.RESTART: Goal.OPEN, Step.FOLLOW: Goal.OPEN,
    Step.SERVE: Goal.SERVE, Step.CLOSE: Goal.NONE,
}  # fmt: skip


@dataclass(slots=True)
class WorkerFacts:
    """What is known of the worker.

    serves          the spec that it was started with; None if there is no worker
    layers          layers of the chain that is open, or was open and will be again
    has_rings       the frontend may have requests in rings that one of our workers served
    is_retrying     it could not do what it was told: it is closed, and another worker tries later
    has_hung        it did not open the chain in time
    is_replaceable  another process is to take its place
    lingers         the frontend's directory is gone, but its rings are served until its driver is quiet
    is_adopted      an earlier service started it
    """

    phase: Phase = Phase.NONE
    serves: Spec | None = None
    layers: list[messages.LayerFacts] = field(default_factory=list)
    export: str = ""
    has_rings: bool = False
    is_retrying: bool = False
    has_hung: bool = False
    is_replaceable: bool = False
    lingers: bool = False
    is_adopted: bool = False


class Aims:
    """The aims of one vbd. When a worker has ended, `worker` is replaced by the facts about the next one."""

    def __init__(self, sight: Sight, reasons: Reasons, limits: Limits, pid: int) -> None:
        self.worker = WorkerFacts()
        self._sight = sight
        self._reasons = reasons
        self._limits = limits
        self._pid = pid

    def is_waited_for(self) -> bool:
        """Return whether a guest has rings that we serve or will serve again; it must see nothing but a delay."""
        # If no worker of this service has served the rings, only a frontend in Connected is sure to have any.
        theirs = (_S.INITIALISED, _S.CONNECTED, _S.CLOSING) if self.worker.has_rings else (_S.CONNECTED,)
        return self.is_joined() and self._sight.theirs in theirs

    def goes_on(self) -> bool:
        """Return whether a guest, as far as was seen, waits for the next service to serve it by the same chain."""
        sight = self._sight
        is_known = self.is_waited_for() and sight.theirs is not _S.CLOSING  # else the next service joins no rings
        return not sight.has_looked or (is_known and self.worker.serves in (None, sight.spec))

    def is_joined(self) -> bool:
        """Return whether our state tells a frontend that it is served, so that it may have requests for us."""
        return self._sight.ours in _JOINED

    def is_live(self) -> bool:
        """Return whether a frontend is still to be served, even if one side is closing."""
        return self.is_waited_for() and not (self._reasons[Reason.BAD_KEYS] or self._reasons[Reason.BAD_RINGS])

    def join(self) -> Join:
        """Return the action that has a worker join the frontend's rings."""
        return join_of(self._sight.keys or {}, self._limits, goes_on=self.is_joined())

    def keys(self, kind: str) -> dict[str, str | None]:
        """Return the keys that the directory of a vbd of this kind should hold, without our state; None removes."""
        sight, worker, reasons = self._sight, self.worker, self._reasons
        params: dict[str, str | None] = {"params": sight.params} if sight.params else {}
        if not sight.is_online:
            return params
        is_usable = worker.phase in USABLE and bool(worker.layers)
        given_up = "" if self.is_waited_for() else reasons[Reason.GIVEN_UP]
        wanted = keys_for(
            sight.keys or {},
            self._limits,
            disk=disk_of(worker.layers[0], worker.serves, sight.keys or {}) if is_usable else None,
            export=export_url(kind, worker.export),
            problem=reasons[Reason.CANNOT_OPEN] or reasons[Reason.BAD_KEYS] or given_up,
            flush_failed=reasons[Reason.FLUSH_FAILED],
            has_come=sight.has_come,
        )
        return {**wanted, **params, **({"kthread-pid": str(self._pid)} if kind == "vbd3" and self._pid else {})}

    def state(self) -> XenbusState:
        """Return the state that we should show now, given how far the worker is."""
        ours, has_ended = self._sight.ours, self.worker.phase is Phase.NONE
        if not self._sight.is_online:
            closed = _S.CLOSED if has_ended else ours
            return _S.CLOSING if self.is_live() else closed
        if self._reasons[Reason.GIVEN_UP] and not self.is_waited_for():
            return _S.CLOSED
        match self.step():
            case Step.OFFER | Step.RESTART if self.worker.phase not in ATTACHED:
                return _S.INIT_WAIT
            case Step.SERVE if self.worker.phase is Phase.SERVING:
                return _S.CONNECTED
            case Step.FOLLOW:
                return _S.CLOSING
            case Step.CLOSE if has_ended:
                return _S.CLOSED
        return ours

    def step(self) -> Step:
        """Return the step that `STEPS` has for the two states, as far as the hotplug script and the rings allow it."""
        sight = self._sight
        step, states = STEPS[sight.ours, sight.theirs], (sight.ours, sight.theirs)
        if step is Step.SERVE and self._reasons[Reason.BAD_RINGS]:
            step = Step.CLOSE  # the frontend has to offer other rings
        elif states == (_S.CLOSING, _S.INITIALISED) and not self.worker.has_rings:
            step = Step.CLOSE  # the frontend has given up its old rings, and offers new ones
        is_seen = sight.has_come if step is Step.SERVE else sight.is_answered or sight.ours is not _S.INIT_WAIT
        return step if is_seen else Step.WAIT  # a toolstack waits to see exactly InitWait

    def goal(self) -> Goal:
        """Return how far the worker should be."""
        goal = Goal.NONE if self._reasons.bar or self.worker.is_retrying else self._wanted()
        return Goal.REPLACE if self.worker.is_replaceable and goal is not Goal.NONE else goal

    def _wanted(self) -> Goal:
        sight = self._sight
        if self.worker.lingers:
            return Goal.SERVE
        is_another = self.worker.serves not in (None, sight.spec)
        if is_another or sight.ours is _S.UNKNOWN or not (sight.is_online or self.is_live()):
            return Goal.NONE
        step = self.step()
        if not sight.is_online or (step in (Step.WAIT, Step.FOLLOW) and self.is_live()):
            return Goal.SERVE
        return Goal.NONE if step is Step.WAIT and sight.ours is _S.CLOSED else _GOALS[step]
