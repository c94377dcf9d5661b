"""One vbd as a pure automaton: an event in, a list of actions out.

Must not perform an action, read a clock or know a socket.

It keeps what was last seen of both ends and how far the worker is, and after every event derives two things anew:
which keys should stand in the backend's directory, and what the worker should be doing. Events are therefore hints
only: one that is lost, doubled or late does no harm, and a store that was away is put right by the next look at it.

    goal OPEN     NONE -> Start -> OPENING -> (Opened) -> OPEN
    goal SERVE    OPEN -> Join -> CONNECTING -> (Connected) -> SERVING
    goal OPEN     SERVING -> Disconnect -> DISCONNECTING -> (Disconnected) -> OPEN
    goal NONE     any phase -> Close -> CLOSING -> (Ended) -> NONE

    a worker that dies         any phase -> (Ended) -> RESTING -> (Expired) -> NONE, and from there to the goal again
    one to be replaced         SERVING -> Close, handing over -> RETIRING -> (Ended) -> NONE
    one that is inherited      NONE -> (Inherited) -> ADOPTING -> (Standing) -> where it says that it stands

`blkif.handshake.STEPS` says what to do in each pair of states. On top of it:

- No frontend is served before the toolstack's hotplug script has come: a toolstack waits to see exactly InitWait before
  it starts one. That it came is kept as ``hotplug-status``, so that the next service knows; its value, ``connected``
  once the chain is open or ``error``, is what the script is told.
- A chain that cannot be opened leaves the state alone, for the same reason, and its sentence in ``hotplug-error``.
- A worker that dies has a successor. A guest that is connected does not see it: our state stays Connected, and the
  successor serves the same rings on. Workers that die one after the other, without a single answer to the guest, come
  later and later, and then no more: the guest waits until an administrator says `xenbackend resume`. What cannot be
  done for a guest that waits is tried again for ever. Without a guest the vbd goes to Closed, with a sentence, until
  it is attached anew or its frontend begins anew.
- While the worker exports its disk to a device model, from which a guest boots before its own driver starts, a
  toolstack finds that by ``physical-device-path``: as QEMU's URL, for kind ``vbd3`` as the socket's path.
- ``online`` = 0 is the toolstack's request to go away: Closed is written once the worker has ended, so that the image
  is free. A frontend that is still connected is served until it has closed or its directory is gone.
- A service that stops leaves a connected vbd's state alone: the next one serves the same ring, and the guest only sees
  a pause. That a flush failed stands in ``flush-failed``, for a service that finds nothing else of the disk's past.
"""

from __future__ import annotations

from dataclasses import replace

from xenbackend.blkif.features import Limits, publish_at_connect, publish_at_probe
from xenbackend.blkif.handshake import STEPS, Step, XenbusState, parse_state
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.backoff import Backoff
from xenbackend.supervisor.vbd.events import (
    Action,
    Called,
    Ended,
    Event,
    Expired,
    Forget,
    Inherited,
    Kill,
    Limit,
    Postponed,
    Replace,
    Resume,
    Seen,
    Start,
    Stop,
    Tell,
    Write,
)
from xenbackend.supervisor.vbd.negotiation import SEGMENTS, disk_of, export_url, join_of
from xenbackend.supervisor.vbd.phase import (
    ANSWERS,
    ATTACHED,
    FORCED_LIMIT_S,
    LIMIT_S,
    STANDINGS,
    USABLE,
    Goal,
    Phase,
)
from xenbackend.supervisor.vbd.spec import Spec, in_one_line, parse_spec
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX
from xenbackend.supervisor.xenstore.paths import VbdPath

_S = XenbusState
_STATUS = "hotplug-status"
_LOST = "flush-failed"


class Device:
    """The automaton of one vbd."""

    def __init__(self, path: VbdPath, limits: Limits, pid: int = 0) -> None:
        """Begin with nothing known; `pid` is the service's, by which `xentop` finds the counters."""
        self.path = path
        self.phase = Phase.NONE
        self.keys: dict[str, str] | None = None  # of the backend's directory, as last seen or written
        self.theirs = _S.UNKNOWN
        self.spec: Spec | None = None  # as the toolstack wants it now
        self.layers: list[messages.LayerFacts] = []  # of the chain that is or was open
        self._export = ""  # the socket on which the worker serves a device model
        self._limits = limits
        self._pid = pid
        self._started: Spec | None = None  # what the worker was started with
        self._refusal = ""  # why the keys cannot be served; until they change
        self._failure = ""  # why there is no worker; until the vbd is attached anew
        self._ring_failure = ""  # why the frontend's rings are not served; until it starts anew
        self._halted = ""  # which ring the frontend broke; until it connects again
        self._paused = ""  # which flush failed; until somebody says to go on, or the frontend begins anew
        self._trouble = ""  # what the disk could not do and tries again
        self._backoff = Backoff()
        self._is_retrying = False  # a worker that could not serve is closed, and another one tries later
        self._is_to_be_replaced = False
        self._is_called = False  # by the hotplug script; see `_has_come`
        self._has_looked = False
        self._has_rings = False  # the frontend may have requests in rings that a worker of ours served
        self._report = 0  # of our question where an inherited worker stands
        self._is_stopping = self.is_leaving = False
        self._limit: tuple[Phase, bool] = (Phase.NONE, False)

    @property
    def ours(self) -> XenbusState:
        """Our own state as the store holds it."""
        return parse_state((self.keys or {}).get("state"))

    @property
    def may_boot(self) -> bool:
        """True while no frontend was ever connected, as far as the store tells."""
        return self.ours in (_S.UNKNOWN, _S.INITIALISING, _S.INIT_WAIT)

    @property
    def hotplug(self) -> str:
        """What the hotplug script is told: ``connected``, ``error``, or nothing yet."""
        return (self.keys or {}).get(_STATUS, "")

    @property
    def error(self) -> str:
        """A sentence for the operator, empty while all is well."""
        own = self._failure or self._refusal or self._backoff.stopped or self._ring_failure
        return own or self._paused or self._trouble or self._backoff.lost or self._halted

    def handle(self, event: Event) -> list[Action]:
        """Take notice of an event and return what to do about it, in order."""
        self._note(event)
        if isinstance(event, Postponed):
            return []
        overdue = self._overdue(event)
        if self.phase is Phase.RESTING and (self._goal() is Goal.NONE or not self._backoff.rest_s):
            self.phase = Phase.NONE
        return [*overdue, *self._write(), *self._move(), *self._set_limit(), *self._forget()]

    def _note(self, event: Event) -> None:
        match event:
            case Seen():
                self._look(event)
            case Ended():
                self._end(event)
            case Called():
                self._is_called = True
            case Stop():
                self._is_stopping, self.is_leaving = True, event.leaves
            case Inherited():
                self.phase, self._report = Phase.ADOPTING, event.report
            case Resume():
                self._paused = self._failure = ""
                self._backoff.forget()
            case Replace():
                self._is_to_be_replaced = self.phase not in (Phase.NONE, Phase.RESTING)
            case _:
                self._hear(event)

    def _hear(self, event: Event) -> None:
        """Take note of what the worker says."""
        match event:
            case messages.Standing() if (self.phase, self._report) == (Phase.ADOPTING, event.report):
                self._adopt(event)
            case messages.Halted():
                self._halted = f"ring {event.ring} was stopped: {event.sentence}"
            case messages.Paused():
                self._paused = event.sentence
            case messages.Trouble():
                self._trouble = event.sentence
            case messages.Swapped():
                self.layers = event.layers
                self._rename(event.chain)
            case _ if (type(event), self.phase) in ANSWERS:
                self._advance(event)

    def _advance(self, event: Event) -> None:
        """Take the worker's answer to what it was told; one that comes too late is not for this phase."""
        former, self.phase = self.phase, ANSWERS[type(event), self.phase]
        if isinstance(event, messages.Opened):
            self.layers, self._export = event.layers, event.export
        elif isinstance(event, messages.Connected):
            self._export, self._has_rings = "", True
            self._backoff.served()
        elif isinstance(event, messages.Disconnected):
            self._has_rings = False
        elif isinstance(event, messages.Failed) and self.is_waited_for():
            self._is_retrying = True
            self._backoff.failed(event.sentence)
        elif isinstance(event, messages.Failed) and former is Phase.OPENING:
            self._failure = event.sentence
        elif isinstance(event, messages.Failed):
            self._ring_failure = event.sentence

    def _look(self, seen: Seen) -> None:
        is_first, self._has_looked = not self._has_looked, True
        has_changed = seen.keys != self.keys
        begins_anew = self.theirs is not _S.INITIALISING and seen.theirs is _S.INITIALISING
        begins_anew |= self.theirs is _S.CLOSED and seen.theirs is _S.INITIALISED  # what lay between was not seen
        self.keys, self.theirs = None if seen.keys is None else dict(seen.keys), seen.theirs
        if self.theirs in (_S.UNKNOWN, _S.INITIALISING, _S.CLOSED):
            self._ring_failure, self._has_rings = "", False
        # Only a toolstack writes Initialising as our state, once, when it makes the node.
        if self.ours is _S.INITIALISING or (begins_anew and (self.layers or self._backoff.stopped)):
            self._failure = ""
            self._backoff.forget()
        if self.ours is _S.INITIALISING:
            self._is_called = False
        if has_changed:
            self._read_spec()
        if is_first and self.phase in (Phase.NONE, Phase.ADOPTING):
            self._paused = self._paused or (self.keys or {}).get(_LOST, "")  # as an earlier service knew
        if is_first and self._started and self.spec:
            self._started = self._started.shown_as(self.spec)

    def _read_spec(self) -> None:
        self.spec, self._refusal = None, ""
        if self.keys is not None:
            try:
                self.spec = parse_spec(self.path, self.keys)
            except ConfigError as error:
                self._refusal = in_one_line(error)

    def _adopt(self, standing: messages.Standing) -> None:
        """Go on from where an inherited worker says that it stands; one that has opened nothing is replaced."""
        self.phase = STANDINGS.get(standing.phase, Phase.OPEN)
        self.layers, self._export = standing.layers, standing.export
        self._halted, self._paused, self._trouble = standing.halted, standing.paused, standing.trouble
        self._has_rings = self.phase is Phase.SERVING
        started = Spec(standing.chain, standing.read_only, standing.shareable, cdrom=False, removable=False)
        self._started = started.shown_as(self.spec or started)

    def _rename(self, chain: str) -> None:
        """Take note that another chain is in service; the toolstack's keys say so too, unless it wants a third one."""
        if self._started is None:
            return
        former, self._started = self._started, replace(self._started, chain=chain)
        if self.spec == former and self.keys is not None:
            self.spec = self._started
            self.keys["params"] = chain

    def _end(self, ended: Ended) -> None:
        if ended.chain:
            self._rename(ended.chain)
        former, self.phase, self._started, self._export = self.phase, Phase.NONE, None, ""
        self._trouble, self._is_to_be_replaced = "", False
        if self._is_retrying:
            self.phase, self._is_retrying = Phase.RESTING, False
        elif former is Phase.CLOSING:
            self.layers = []
        elif former is not Phase.RETIRING:
            self._backoff.died(ended.sentence, in_vain=not ended.has_progressed)
            if not self._backoff.stopped:
                self.phase = Phase.RESTING
            elif not self.is_waited_for():
                self._failure = ended.sentence
                self._backoff.forget()

    def is_waited_for(self) -> bool:
        """True while a guest has rings that we serve, or will again: it must see nothing but a delay."""
        theirs = (_S.INITIALISED, _S.CONNECTED, _S.CLOSING) if self._has_rings else (_S.CONNECTED,)
        return self.ours in (_S.CONNECTED, _S.CLOSING) and self.theirs in theirs

    def _overdue(self, event: Event) -> list[Action]:
        if isinstance(event, Expired) and self.phase is Phase.RESTING:
            self.phase = Phase.NONE
        elif isinstance(event, Expired) and self.phase in LIMIT_S:
            return [Kill(f"the worker was killed: it was {self.phase.value} for too long")]
        return []

    def _write(self) -> list[Action]:
        """Return what the store lacks, and take it as written: a later look corrects that if it is not so."""
        if self.keys is None or self.ours is _S.UNKNOWN:
            return []
        before = self.ours
        wanted = {**self._facts(), "state": str(self._target().value)}  # the state comes last: it says "read the rest"
        missing = {key: value for key, value in wanted.items() if self.keys.get(key) != value}
        if "sectors" in missing and before is _S.CONNECTED:
            missing["state"] = wanted["state"]  # a frontend looks at the size again when the state is written
        for key, value in missing.items():
            if value is None:
                self.keys.pop(key, None)
            else:
                self.keys[key] = value
        return [Write(missing, before)] if missing else []

    def _facts(self) -> dict[str, str | None]:
        """Return the keys besides the state."""
        if not self._is_online():
            return {}
        keys: dict[str, str | None] = {**publish_at_probe(self._limits), _LOST: self._paused[:SENTENCE_MAX] or None}
        if self.ours in (_S.CONNECTED, _S.CLOSING) and SEGMENTS in (self.keys or {}):
            del keys[SEGMENTS]  # by an earlier service with other limits: a frontend goes by what it was offered
        if self._failure or self._refusal:
            keys |= {"hotplug-error": (self._failure or self._refusal)[:SENTENCE_MAX], _STATUS: "error"}
        elif self.phase in USABLE and self.layers:
            keys |= publish_at_connect(disk_of(self.layers[0], self._started, self.keys or {}))
            url = export_url(self.path.kind, self._export)
            keys |= {"hotplug-error": None, _STATUS: "connected", "physical-device-path": url}
        if self.path.kind == "vbd3" and self._pid:
            keys["kthread-pid"] = str(self._pid)
        if not self._has_come():
            keys.pop(_STATUS, None)
        return keys

    def _has_come(self) -> bool:
        """True once the toolstack's hotplug script has come, to this service or an earlier one, or if there is none."""
        keys = self.keys or {}
        return self._is_called or _STATUS in keys or not keys.get("script")

    def _target(self) -> XenbusState:
        """Return the state that we should show now, given how far the worker is."""
        is_attached = self.phase in ATTACHED
        if not self._is_online():
            if self._is_live():
                return _S.CLOSING
            return _S.CLOSED if self.phase is Phase.NONE else self.ours
        if self.layers and (self._failure or self._refusal):
            return _S.CLOSED if self.phase is Phase.NONE else self.ours
        match self._step():
            case Step.OFFER | Step.RESTART if not is_attached:
                return _S.INIT_WAIT
            case Step.SERVE if self.phase is Phase.SERVING:
                return _S.CONNECTED
            case Step.FOLLOW:
                return _S.CLOSING
            case Step.CLOSE if not is_attached:
                return _S.CLOSED
        return self.ours

    def _step(self) -> Step:
        step = STEPS[self.ours, self.theirs]
        if step is Step.SERVE and not self._has_come():
            return Step.WAIT
        return Step.CLOSE if step is Step.SERVE and self._ring_failure else step  # the frontend has to bring others

    def _goal(self) -> Goal:
        if self._is_stopping or self.ours is _S.UNKNOWN or self._failure or self._refusal:
            return Goal.NONE
        if self._backoff.stopped or self._is_retrying:
            return Goal.NONE
        if self._started not in (None, self.spec):
            return Goal.NONE  # another disk is wanted now
        if not self._is_online():
            return Goal.SERVE if self._is_live() else Goal.NONE
        match self._step():
            case Step.SERVE:
                return Goal.SERVE
            case Step.WAIT | Step.FOLLOW if self._is_live():
                return Goal.SERVE
        return Goal.OPEN

    def _is_online(self) -> bool:
        return self.keys is not None and self.keys.get("online") != "0"

    def _is_live(self) -> bool:
        """True while the frontend may still have requests for us although one side is closing."""
        if self._failure or self._refusal or self._ring_failure or self.ours not in (_S.CONNECTED, _S.CLOSING):
            return False
        # Of a frontend that an earlier service had, only one in Connected surely has rings.
        return self.phase is not Phase.CLOSING and self.is_waited_for()

    def _move(self) -> list[Action]:
        """Return the worker's next step towards the goal; a phase that waits for an answer stays as it is."""
        goal = self._goal()
        if self.is_leaving or not (self._has_looked or self._is_stopping):
            return []
        if self.phase is Phase.NONE:
            if goal is Goal.NONE or self.spec is None:
                return []
            self.layers = self.layers if self.is_waited_for() else []
            self.phase, self._started = Phase.OPENING, self.spec
            return [Start(self.spec, self._paused if self.ours in (_S.CONNECTED, _S.CLOSING) else "")]
        if goal is Goal.NONE:
            if self.phase in (Phase.CLOSING, Phase.RETIRING, Phase.ADOPTING):
                return []
            self.phase = Phase.CLOSING
            return [Tell(messages.Close())]
        if self.phase is Phase.OPEN and goal is Goal.SERVE:
            join = join_of(self.keys or {}, self._limits, goes_on=self.ours in (_S.CONNECTED, _S.CLOSING))
            self.phase, self._halted = Phase.CONNECTING, ""
            self._paused = self._paused if join.goes_on else ""
            return [join]
        if self._is_to_be_replaced and self.phase in (Phase.OPEN, Phase.SERVING):
            self.phase = Phase.RETIRING
            return [Tell(messages.Close(hands_over=True))]
        if self.phase is Phase.SERVING and goal is Goal.OPEN:
            self.phase = Phase.DISCONNECTING
            return [Tell(messages.Disconnect())]
        return []

    def _set_limit(self) -> list[Action]:
        is_forced = self._has_looked and self.keys is None and self.phase in (Phase.CLOSING, Phase.RETIRING)
        if self._limit == (self.phase, is_forced):
            return []
        self._limit = (self.phase, is_forced)
        limit_s = self._backoff.rest_s if self.phase is Phase.RESTING else LIMIT_S.get(self.phase)
        return [Limit(FORCED_LIMIT_S if is_forced else limit_s)]

    def _forget(self) -> list[Action]:
        has_gone = self.keys is None and self._has_looked
        return [Forget()] if self.is_leaving or (self.phase is Phase.NONE and (has_gone or self._is_stopping)) else []
