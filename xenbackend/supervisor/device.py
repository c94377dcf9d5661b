"""One vbd as a pure automaton: an event in, a list of actions out.

Must not perform an action, read a clock or know a socket.

It keeps what was last seen of both ends and how far the worker is, and after every event derives two things anew:
which keys should stand in the backend's directory, and what the worker should be doing. Events are therefore hints
only: one that is lost, doubled or late does no harm, and a store that was away is put right by the next look at it.

    goal OPEN     NONE -> Start -> OPENING -> (Opened) -> OPEN
    goal SERVE    OPEN -> Join -> CONNECTING -> (Connected) -> SERVING
    goal OPEN     SERVING -> Disconnect -> DISCONNECTING -> (Disconnected) -> OPEN
    goal NONE     any phase -> Close -> CLOSING -> (Ended) -> NONE

`blkif.handshake.STEPS` says what to do in each pair of states. On top of it:

- No frontend is served before the toolstack's hotplug script has come: a toolstack waits to see exactly InitWait before
  it starts one. That it came is kept as ``hotplug-status``, so that the next service knows; its value, ``connected``
  once the chain is open or ``error``, is what the script is told.
- A chain that cannot be opened leaves the state alone, for the same reason, and its sentence in ``hotplug-error``. A
  worker that dies afterwards takes the vbd to Closed, with a sentence, until it is attached anew or its frontend begins
  anew; the next worker gets the memories of the one that died.
- While the worker exports its disk to a device model, from which a guest boots before its own driver starts, a
  toolstack finds that by ``physical-device-path``: as QEMU's URL, for kind ``vbd3`` as the socket's path.
- ``online`` = 0 is the toolstack's request to go away: Closed is written once the worker has ended, so that the image
  is free. A frontend that is still connected is served until it has closed or its directory is gone.
- A service that stops leaves a connected vbd's state alone: it is served again by the next service, from the same
  ring, and its guest only sees a pause. Not so a disk that is paused because a flush failed: what it lost stays lost,
  and a successor would know nothing of it, so it goes to Closed.
"""

from __future__ import annotations

from enum import Enum

from xenbackend import control
from xenbackend.blkif.features import MAX_SEGMENTS, Disk, Limits, publish_at_connect, publish_at_probe
from xenbackend.blkif.handshake import STEPS, Step, XenbusState, parse_state
from xenbackend.errors import ChainError, ConfigError
from xenbackend.supervisor.events import (
    Action,
    Called,
    Ended,
    Event,
    Expired,
    Forget,
    Join,
    Kill,
    Limit,
    Postponed,
    Seen,
    Start,
    Stop,
    Tell,
    Write,
)
from xenbackend.supervisor.nodes import SENTENCE_MAX
from xenbackend.supervisor.paths import VbdPath
from xenbackend.supervisor.spec import Spec, parse_spec

_S = XenbusState
_SEGMENTS = "feature-max-indirect-segments"
_STATUS = "hotplug-status"


class Phase(Enum):
    """How far the worker is."""

    NONE = "none"
    OPENING = "opening"
    OPEN = "open"
    CONNECTING = "connecting"
    SERVING = "serving"
    DISCONNECTING = "disconnecting"
    CLOSING = "closing"


class Goal(Enum):
    """How far the worker should be."""

    NONE = "none"
    OPEN = "open"
    SERVE = "serve"


_LIMIT_S = {Phase.OPENING: 60.0, Phase.CONNECTING: 60.0, Phase.DISCONNECTING: 30.0, Phase.CLOSING: 30.0}
FORCED_LIMIT_S = 5.0  # once our node is gone: nobody waits for the drain, and a domain must not become a zombie
_ATTACHED = (Phase.CONNECTING, Phase.SERVING, Phase.DISCONNECTING, Phase.CLOSING)  # rings may be mapped
_ANSWERS: dict[tuple[type, Phase], Phase] = {
    (control.Opened, Phase.OPENING): Phase.OPEN,
    (control.Failed, Phase.OPENING): Phase.OPEN,  # the process is still there, and is told to close next
    (control.Opened, Phase.CONNECTING): Phase.CONNECTING,  # what was only looked at until now
    (control.Connected, Phase.CONNECTING): Phase.SERVING,
    (control.Failed, Phase.CONNECTING): Phase.OPEN,
    (Postponed, Phase.CONNECTING): Phase.OPEN,
    (control.Disconnected, Phase.DISCONNECTING): Phase.OPEN,
}
_USABLE = (Phase.OPEN, Phase.CONNECTING, Phase.SERVING, Phase.DISCONNECTING)


class Device:
    """The automaton of one vbd."""

    def __init__(self, path: VbdPath, limits: Limits, pid: int = 0) -> None:
        """Begin with nothing known; `pid` is the service's, by which `xentop` finds the counters."""
        self.path = path
        self.phase = Phase.NONE
        self.keys: dict[str, str] | None = None  # of the backend's directory, as last seen or written
        self.theirs = _S.UNKNOWN
        self.spec: Spec | None = None  # as the toolstack wants it now
        self.layers: list[control.LayerFacts] = []  # of the chain that is or was open
        self._export = ""  # the socket on which the worker serves a device model
        self._limits = limits
        self._pid = pid
        self._started: Spec | None = None  # what the worker was started with
        self._refusal = ""  # why the keys cannot be served; until they change
        self._failure = ""  # why there is no worker; until the vbd is attached anew
        self._ring_failure = ""  # why the frontend's rings are not served; until it starts anew
        self._halted = ""  # which ring the frontend broke; until it connects again
        self._paused = ""  # which flush failed; until the frontend connects again
        self._is_called = False  # by the hotplug script; see `_has_come`
        self._is_stopping = False
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
        return self._failure or self._refusal or self._ring_failure or self._paused or self._halted

    def handle(self, event: Event) -> list[Action]:
        """Take notice of an event and return what to do about it, in order."""
        self._note(event)
        if isinstance(event, Postponed):
            return []
        return [*self._overdue(event), *self._write(), *self._move(), *self._set_limit(), *self._forget()]

    def _note(self, event: Event) -> None:
        match event:
            case Seen():
                self._look(event)
            case Ended():
                self._end(event)
            case Called():
                self._is_called = True
            case Stop():
                self._is_stopping = True
            case control.Halted():
                self._halted = f"ring {event.ring} was stopped: {event.sentence}"
            case control.Paused():
                self._paused = event.sentence
            case _ if (type(event), self.phase) in _ANSWERS:
                self._advance(event)

    def _advance(self, event: Event) -> None:
        """Take the worker's answer to what it was told; one that comes too late is not for this phase."""
        former, self.phase = self.phase, _ANSWERS[type(event), self.phase]
        if isinstance(event, control.Opened):
            self.layers, self._export = event.layers, event.export
        elif isinstance(event, control.Connected):
            self._export = ""
        elif isinstance(event, control.Failed) and former is Phase.OPENING:
            self._failure = event.sentence
        elif isinstance(event, control.Failed):
            self._ring_failure = event.sentence

    def _look(self, seen: Seen) -> None:
        has_changed = seen.keys != self.keys
        begins_anew = self.theirs is not _S.INITIALISING and seen.theirs is _S.INITIALISING
        begins_anew |= self.theirs is _S.CLOSED and seen.theirs is _S.INITIALISED  # what lay between was not seen
        self.keys, self.theirs = None if seen.keys is None else dict(seen.keys), seen.theirs
        if self.theirs in (_S.UNKNOWN, _S.INITIALISING, _S.CLOSED):
            self._ring_failure = ""
        # Only a toolstack writes Initialising as our state, once, when it makes the node. A frontend that begins anew
        # gets another worker, unless it was the opening that failed: that fails again.
        if self.ours is _S.INITIALISING or (begins_anew and self.layers):
            self._failure = ""
        if self.ours is _S.INITIALISING:
            self._is_called = False
        if has_changed:
            self._read_spec()

    def _read_spec(self) -> None:
        self.spec, self._refusal = None, ""
        if self.keys is not None:
            try:
                self.spec = parse_spec(self.path, self.keys)
            except ConfigError as error:
                self._refusal = _in_one_line(error)

    def _end(self, ended: Ended) -> None:
        """The seam for recovery: whatever a successor of the worker would need is still here."""
        if self.phase is Phase.CLOSING:
            self.layers = []
        elif self.phase is not Phase.NONE:
            self._failure = ended.sentence
        self.phase, self._started, self._export = Phase.NONE, None, ""

    def _overdue(self, event: Event) -> list[Action]:
        if isinstance(event, Expired) and self.phase in _LIMIT_S:
            return [Kill(f"the worker was killed: it was {self.phase.value} for too long")]
        return []

    def _write(self) -> list[Action]:
        """Return what the store lacks, and take it as written: a later look corrects that if it is not so."""
        if self.keys is None or self.ours is _S.UNKNOWN:
            return []
        before = self.ours
        wanted = {**self._facts(), "state": str(self._target().value)}  # the state comes last: it says "read the rest"
        missing = {key: value for key, value in wanted.items() if self.keys.get(key) != value}
        if not missing:
            return []
        for key, value in missing.items():
            if value is None:
                self.keys.pop(key, None)
            else:
                self.keys[key] = value
        return [Write(missing, before)]

    def _facts(self) -> dict[str, str | None]:
        """Return the keys besides the state."""
        if not self._is_online():
            return {}
        keys: dict[str, str | None] = dict(publish_at_probe(self._limits))
        if self.ours in (_S.CONNECTED, _S.CLOSING) and _SEGMENTS in (self.keys or {}):
            del keys[_SEGMENTS]  # by an earlier service with other limits: a frontend goes by what it was offered
        if self._failure or self._refusal:
            keys |= {"hotplug-error": (self._failure or self._refusal)[:SENTENCE_MAX], _STATUS: "error"}
        elif self.phase in _USABLE and self.layers:
            keys |= publish_at_connect(self._disk(self.layers[0]))
            keys |= {"hotplug-error": None, _STATUS: "connected", "physical-device-path": self._exported_at()}
        if self.path.kind == "vbd3" and self._pid:
            keys["kthread-pid"] = str(self._pid)
        if not self._has_come():
            keys.pop(_STATUS, None)
        return keys

    def _has_come(self) -> bool:
        """True once the toolstack's hotplug script has come, to this service or an earlier one, or if there is none."""
        keys = self.keys or {}
        return self._is_called or _STATUS in keys or not keys.get("script")

    def _exported_at(self) -> str | None:
        if not self._export or self.path.kind == "vbd3":
            return self._export or None
        return f"nbd+unix:///?socket={self._export}"

    def _disk(self, top: control.LayerFacts) -> Disk:
        spec = self._started
        return Disk(
            size=top.size,
            sector_size=top.sector_size,
            read_only=top.read_only or (spec is not None and spec.read_only),
            can_flush=top.can_flush,
            can_discard=top.can_discard and (self.keys or {}).get("discard-enable") != "0",
            discard_granularity=top.discard_granularity,
            discard_alignment=top.discard_alignment,
            cdrom=spec is not None and spec.cdrom,
            removable=spec is not None and spec.removable,
        )

    def _target(self) -> XenbusState:
        """Return the state that we should show now, given how far the worker is."""
        is_attached = self.phase in _ATTACHED
        if not self._is_online():
            if self._is_live():
                return _S.CLOSING
            return _S.CLOSED if self.phase is Phase.NONE else self.ours
        if self._paused and self._is_stopping and self.ours in (_S.CONNECTED, _S.CLOSING):
            return _S.CLOSED if self.phase is Phase.NONE else _S.CLOSING
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
        # Rings that could not be mapped are not tried again: the frontend has to come back with others.
        return Step.CLOSE if step is Step.SERVE and self._ring_failure else step

    def _goal(self) -> Goal:
        if self._is_stopping or self.ours is _S.UNKNOWN or self._failure or self._refusal:
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
        if self.phase is Phase.SERVING:
            return self.theirs in (_S.INITIALISED, _S.CONNECTED, _S.CLOSING)
        # A service that was started again: only a frontend in Connected surely has rings.
        return self.theirs is _S.CONNECTED and self.phase is not Phase.CLOSING

    def _move(self) -> list[Action]:
        """Return the worker's next step towards the goal; a phase that waits for an answer stays as it is."""
        goal = self._goal()
        if self.phase is Phase.NONE:
            if goal is Goal.NONE or self.spec is None:
                return []
            self.phase, self.layers, self._started = Phase.OPENING, [], self.spec
            return [Start(self.spec)]
        if goal is Goal.NONE:
            if self.phase is Phase.CLOSING:
                return []
            self.phase = Phase.CLOSING
            return [Tell(control.Close())]
        if self.phase is Phase.OPEN and goal is Goal.SERVE:
            self.phase, self._halted, self._paused = Phase.CONNECTING, "", ""
            return [self._join()]
        if self.phase is Phase.SERVING and goal is Goal.OPEN:
            self.phase = Phase.DISCONNECTING
            return [Tell(control.Disconnect())]
        return []

    def _join(self) -> Join:
        offered = self.keys or {}
        segments = offered.get(_SEGMENTS, "")
        is_number = segments.isascii() and segments.isdecimal() and len(segments) <= len(str(MAX_SEGMENTS))
        return Join(
            can_discard=offered.get("feature-discard") == "1",
            max_segments=min(int(segments), MAX_SEGMENTS) if is_number else self._limits.max_segments,
        )

    def _set_limit(self) -> list[Action]:
        is_forced = self.keys is None and self.phase is Phase.CLOSING
        if self._limit == (self.phase, is_forced):
            return []
        self._limit = (self.phase, is_forced)
        return [Limit(FORCED_LIMIT_S if is_forced else _LIMIT_S.get(self.phase))]

    def _forget(self) -> list[Action]:
        is_over = self.phase is Phase.NONE and (self.keys is None or self._is_stopping)
        return [Forget()] if is_over else []


def _in_one_line(error: ConfigError) -> str:
    if isinstance(error, ChainError):
        return f"{error.problem}: {error.chain}"
    return str(error)
