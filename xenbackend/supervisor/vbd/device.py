"""One vbd as a pure automaton: an event in, a list of actions out.

Must not perform an action, read a clock or know a socket.

It keeps what was last seen of both ends (`sight`) and what the worker last said. After every event it derives two
things from them: which keys should be in the backend's directory, and how far the worker should be. Events are
therefore only hints: one that is lost, doubled or late does no harm, and after xenstore was away the next look puts
everything right. `phase.MOVES` says what the worker is told, `phase.STANDINGS` what follows from what it says,
`blkif.handshake.STEPS` what to do in each pair of states, `reasons.Reason` why a disk is not served. Further rules:

- No frontend is served before the toolstack's hotplug script has come, because a toolstack starts the script only when
  it sees exactly InitWait. ``hotplug-status`` tells the next service that the script has come. Its value is what the
  script is told: ``connected`` once the chain is open, or ``error``. Until then a frontend that closes waits, too.
- If the chain cannot be opened then, our state stays as it is, for the same reason, and ``hotplug-error`` says why.
- Closed is written once no worker is left, whichever side closed first, so that the image is free. If the frontend then
  begins anew, it is offered the disk at once, and another worker is started.
- A worker that dies gets a successor. A connected guest does not notice: our state stays Connected, and the successor
  continues on the same rings. If workers die one after the other without a single answer to the guest, each successor
  is started later, and finally none is: the guest waits until an administrator runs `xenbackend resume`. Without a
  guest the vbd goes to Closed, with the reason, until its frontend begins anew. Failures to serve are retried for
  ever, if a guest waits for the disk or the toolstack was told that it is there.
- A waiting guest is served neither from another file than before nor from one that has shrunk, until an administrator
  runs `xenbackend resume`.
- A guest may boot from a device model before its own driver starts. While the worker exports the disk to one,
  ``physical-device-path`` tells the toolstack where: as a URL for QEMU, for kind ``vbd3`` as the socket's path.
- ``online`` = 0 is the toolstack's request to remove the vbd, which ends in Closed. A frontend that is still connected
  is served until it has closed. If its directory was removed, it is served until it is quiet, or for 5 s: Linux flushes
  a mounted file system when its disk goes, and waits for that for ever.
- If the node is gone, or was made anew in the same place, the vbd is over: the worker is closed, by force if it is not
  quick, and nothing is written any more.
- A service that stops leaves a connected vbd's state alone: the next one serves the same rings, and the guest only sees
  a pause. The next service would not know of requests that a dead worker had taken, so another worker does them first.
  ``flush-failed`` says that a flush failed, for a service that finds nothing else of the disk's past.
- After an exchange ``params`` is set to the new chain, unless the toolstack wants a third one.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.errors import printable
from xenbackend.protocol import messages
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.aims import Aims, WorkerFacts
from xenbackend.supervisor.vbd.backoff import Backoff
from xenbackend.supervisor.vbd.negotiation import EXPORT, LOST, shrinkage
from xenbackend.supervisor.vbd.phase import (
    FAILURES,
    FORCED_LIMIT_S,
    LIMIT_S,
    LINGER_S,
    MOVES,
    QUIET_S,
    STANDINGS,
    Goal,
    Move,
    Phase,
)
from xenbackend.supervisor.vbd.reasons import Cause, Reason, Reasons
from xenbackend.supervisor.vbd.sight import Sight
from xenbackend.supervisor.vbd.spec import Spec
from xenbackend.supervisor.xenstore.paths import VbdPath

_S = XenbusState
_NO_LIMIT = (Phase.NONE, False, False)
_OPENING = (Phase.OPENING, Phase.CONNECTING)


def _sentence(waits: events.Waits) -> str:
    """Return a sentence about what the disk's opener waits for; empty if it does not wait."""
    name = printable(waits.name)
    if not name:
        return ""
    if waits.makes_key:
        return f"the key is being derived from {name}, which takes seconds, one disk at a time; then the disk continues"
    return f"{name} cannot be opened: its storage does not answer; the disk continues when it does"


def _kill_who_waits() -> events.Kill:
    return events.Kill("the worker was killed: it was no longer needed, and was waiting for a file or a key")


class Device:
    """The automaton of one vbd; `sight` is what it has seen of both ends."""

    def __init__(self, path: VbdPath, limits: Limits, pid: int = 0, *, has_past: bool = False) -> None:
        """Begin with nothing known.

        `pid` is the service's, by which `xentop` finds the counters. `has_past`: an earlier service served the vbd.
        """
        self.path = path
        self.is_leaving = self._is_mistake = False
        self._is_stopping = self._is_unfinished = False
        self.sight = Sight(path, has_past=has_past)
        self._reasons = Reasons()
        self._aims = Aims(self.sight, self._reasons, limits, pid)
        self._backoff = Backoff()
        self._told_of = ""  # the chain whose size was shown last
        self._limit = _NO_LIMIT

    @property
    def phase(self) -> Phase:
        """How far the worker is."""
        return self._aims.worker.phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._aims.worker.phase = phase

    @property
    def layers(self) -> list[messages.LayerFacts]:
        """The layers of the chain that is or was open, the top one first."""
        return self._aims.worker.layers

    @property
    def may_boot(self) -> bool:
        """True while no frontend was ever connected, as far as xenstore shows.

        ``physical-device-path`` is there from the first opening of the chain until a frontend is connected.
        """
        was_open = self.sight.hotplug == "connected" and EXPORT not in (self.sight.keys or {})
        return self.sight.ours in (_S.UNKNOWN, _S.INITIALISING, _S.INIT_WAIT) and not was_open

    @property
    def error(self) -> str:
        """A sentence for the operator, empty while all is well."""
        return self._reasons[self._reasons.first] if self._reasons.first else ""

    @property
    def is_mistaken(self) -> bool:
        """Whether the disk is not served because of a mistake in the chain or in the toolstack's keys."""
        is_unusable = bool(self._reasons[Reason.CANNOT_OPEN]) and self._is_mistake
        return is_unusable or bool(self._reasons[Reason.BAD_KEYS])

    @property
    def reason(self) -> str:
        """One word for `error`, for programs."""
        return self._reasons.word()

    def has_found_another_file(self) -> bool:
        """Return whether the disk is not served because a name now leads to another file than before."""
        return bool(self._reasons[Reason.OTHER_FILE])

    def is_undecided(self) -> bool:
        """Return whether the disk is not served because nobody knows which of two chains has the guest's data."""
        return bool(self._reasons[Reason.UNDECIDED])

    def doubt(self, sentence: str) -> None:
        """Serve nothing until an administrator chooses a chain; `sentence` says why. An empty one changes nothing."""
        self._reasons.say(Reason.UNDECIDED, sentence)

    def waits_without_worker(self) -> bool:
        """Return whether somebody waits for the disk while there is no worker."""
        return self.phase in (Phase.NONE, Phase.RESTING) and self.sight.is_online and self.is_promised()

    def is_promised(self) -> bool:
        """Return whether a guest waits for the disk, or the toolstack was told that it is there."""
        return self.is_waited_for() or self.sight.hotplug == "connected"

    def is_waited_for(self) -> bool:
        """Return whether a guest has rings that we serve or will serve again; it must see nothing but a delay."""
        return self._aims.is_waited_for()

    def handle(self, event: events.Event) -> list[events.Action]:
        """Take an event, and return the actions that follow from it, in order."""
        killed = self._hear(event)
        if isinstance(event, events.Postponed):
            return self._set_limit()
        self._note(event)
        if self.phase is Phase.RESTING and (self._goal() is Goal.NONE or not self._backoff.rest_s):
            self.phase = Phase.NONE
        return [*killed, *self._write(), *self._move(), *self._set_limit(), *self._forget()]

    # events

    def _hear(self, event: events.Event) -> list[events.Action]:
        """Handle what an event says about the worker."""
        match event:
            case messages.Standing() if self.phase not in (Phase.NONE, Phase.RESTING):
                return self._stand(event)
            case events.Expired():
                return self._expire()
            case events.Waits():
                return self._wait(event)
            case events.Inherited():
                self._aims.worker = WorkerFacts(Phase.ADOPTING, is_adopted=True)
                self.sight.had_state = self.sight.had_keys = True
            case events.Refused() if self.phase is Phase.CONNECTING:
                self._fail(event.sentence, errno.EINVAL)
            case events.Postponed() if self.phase is Phase.CONNECTING:
                self.phase = Phase.OPEN
            case events.Ended():
                self._end(event)
        return []

    def _note(self, event: events.Event) -> None:
        """Handle what an event says about the vbd."""
        match event:
            case events.Seen():
                self._look(event)
            case events.Called():
                self.sight.is_called = True
            case events.Exchanged():
                self._exchange(event)
            case events.Resume() | events.Replaced():
                self._clear(Cause.RESUME)
                if isinstance(event, events.Replaced):
                    self._clear(Cause.REPLACED)
            case events.Replace():
                self._aims.worker.is_replaceable = self.phase not in (Phase.NONE, Phase.RESTING)
            case events.Stop():
                self._is_stopping, self.is_leaving = True, event.leaves
                self._is_unfinished = event.is_unfinished and self.phase is not Phase.SERVING

    def _clear(self, cause: Cause) -> None:
        self._reasons.clear(cause)
        if cause in (Cause.RESUME, Cause.ANEW):
            self._backoff.forget()
        elif cause is Cause.LET_GO:
            self._aims.worker.has_rings = False

    def _look(self, seen: events.Seen) -> None:
        is_first, worker = not self.sight.has_looked, self._aims.worker
        had_rings = worker.lingers or (worker.has_rings and self.phase is Phase.SERVING)
        causes = self.sight.look(seen)
        is_taken_away = seen.theirs is _S.UNKNOWN and not (self.sight.is_online or self.sight.is_over or seen.has_left)
        worker.lingers = had_rings and is_taken_away
        worker.is_replaceable |= self.sight.has_moved and self.phase is Phase.SERVING
        for cause in causes:
            self._clear(cause)
        if Cause.KEYS in causes:
            self._reasons.say(Reason.BAD_KEYS, self.sight.problem)
            self._aims.worker.serves = self._as_shown(self._aims.worker.serves)
        if is_first and not self._reasons[Reason.FLUSH_FAILED]:
            self._reasons.say(Reason.FLUSH_FAILED, (self.sight.keys or {}).get(LOST, ""))  # as an earlier service noted

    def _as_shown(self, serves: Spec | None) -> Spec | None:
        """Return the spec that a worker serves, with what only the guest is told, and no worker, from the keys."""
        return self.sight.spec if serves and self.sight.spec and serves.is_served_like(self.sight.spec) else serves

    def _exchange(self, exchanged: events.Exchanged) -> None:
        if self._aims.worker.serves is not None:
            self._aims.worker.serves = replace(self._aims.worker.serves, chain=exchanged.chain)
        self._told_of = exchanged.chain
        self.sight.exchange(exchanged)

    def _stand(self, standing: messages.Standing) -> list[events.Action]:
        """Handle a standing, by `STANDINGS`. One that is impossible in this phase is a breach."""
        former, stage = self.phase, standing.stage
        has_failed = bool(standing.failure) and former in (Phase.OPENING, Phase.CONNECTING)
        if stage not in STANDINGS[former] or (has_failed and (former, stage) not in FAILURES):
            said = f"{stage.value}{' and failed' * has_failed}, while it was {former.value}"
            return [events.Kill(f"the worker was killed: it says that it is {said}", is_breach=True)]
        if has_failed:
            self._is_mistake = standing.is_mistake
            self._fail(standing.failure, standing.errno)
            return []
        if former is Phase.OPENING and standing.layers and self.is_waited_for() and self._was_told_of(standing.chain):
            self._reasons.say(Reason.OTHER_SIZE, shrinkage(standing.layers[0], self.sight.keys or {}))
            if self._reasons[Reason.OTHER_SIZE]:
                self.phase = Phase.OPEN  # it is closed next, and nothing of it is shown
                return []
        worker, self.phase = self._aims.worker, STANDINGS[former][stage]
        if former is Phase.ADOPTING:
            chain = standing.chain if standing.layers else ""
            worker.serves = self._as_shown(Spec(chain, standing.read_only, standing.shareable, False, False))
        self._believe(standing)
        if self.phase is Phase.SERVING and former is not Phase.SERVING:
            self._clear(Cause.SERVED)
            self._backoff.served()
            worker.has_rings, self._is_unfinished, self.sight.must_compare = True, False, worker.is_adopted
        elif former is Phase.DISCONNECTING and self.phase is Phase.OPEN:
            worker.has_rings = False
        return []

    def _was_told_of(self, chain: str) -> bool:
        """Return whether the guest was told the size of this chain, as far as is known; of another medium it is now."""
        return self._told_of in ("", chain)

    def _believe(self, standing: messages.Standing) -> None:
        """Take over what a standing says. The silence of a worker that does not serve clears no earlier problem."""
        worker = self._aims.worker
        worker.layers = standing.layers or worker.layers
        self._told_of = standing.chain if standing.layers else self._told_of
        worker.export = standing.export
        self._reasons.say(Reason.TROUBLE, standing.trouble)
        for reason, sentence in {Reason.FLUSH_FAILED: standing.flush_failed, Reason.HALTED: standing.halted}.items():
            if sentence or standing.stage is Stage.SERVING:
                self._reasons.say(reason, sentence)

    def _fail(self, sentence: str, code: int) -> None:
        """Note what the worker could not do. Its process still runs, and is told to close next."""
        is_opening, self.phase = self.phase is Phase.OPENING, Phase.OPEN
        is_wanted = self.is_waited_for() or not self.sight.has_looked  # then a guest may wait
        is_wanted |= is_opening and self.sight.hotplug == "connected"
        if is_wanted and is_opening and code == errno.ESTALE:
            self._reasons.say(Reason.OTHER_FILE, sentence)
        elif is_wanted:
            self._aims.worker.is_retrying = True
            self._backoff.failed()
            self._reasons.say(Reason.INTERRUPTED, sentence)
        else:
            self._reasons.say(Reason.CANNOT_OPEN if is_opening else Reason.BAD_RINGS, sentence)

    def _end(self, ended: events.Ended) -> None:
        worker, former = self._aims.worker, self.phase
        is_waiting = ended.has_waited or (worker.has_hung and self.is_promised())
        self._aims.worker = WorkerFacts(
            layers=worker.layers if self.is_waited_for() else [], has_rings=worker.has_rings
        )
        self._is_unfinished = ended.is_unfinished and not worker.is_retrying  # else the next one would fail, too
        self._reasons.clear(Cause.ENDED)
        if worker.is_retrying:
            self.phase = Phase.RESTING
        elif is_waiting:
            self._reasons.say(Reason.INTERRUPTED, ended.sentence)
            self._backoff.failed()
            self.phase = Phase.RESTING
        elif former not in (Phase.CLOSING, Phase.RETIRING) or (self._is_stopping and ended.is_unfinished):
            self._reasons.say(Reason.INTERRUPTED, ended.sentence)
            if self._backoff.died(in_vain=not ended.has_progressed, is_hasty=ended.is_hasty):
                self.phase = Phase.RESTING
            else:
                in_a_row = f"{self._backoff.deaths} in a row; start another one with `xenbackend resume`"
                self._reasons.say(Reason.GIVEN_UP, f"{ended.sentence}, {in_a_row}")

    def _wait(self, waits: events.Waits) -> list[events.Action]:
        """Note what the opener waits for, or that it waits no more."""
        had_to_wait, sentence = self._has_to_wait(), _sentence(waits)
        self._reasons.say(Reason.STORAGE, "" if waits.makes_key else sentence)
        self._reasons.say(Reason.KEY, sentence if waits.makes_key else "")
        if had_to_wait and not waits.name:
            self._limit = _NO_LIMIT  # the time limit begins again
        return [_kill_who_waits()] if waits.name and self.phase is Phase.CLOSING else []

    def _has_to_wait(self) -> bool:
        return bool(self._reasons[Reason.STORAGE] or self._reasons[Reason.KEY])

    def _expire(self) -> list[events.Action]:
        if self.phase in _OPENING and self._has_to_wait():
            return []  # another worker would wait as well, and leave one more hanging process
        if self.phase in LIMIT_S:
            if self.phase is Phase.OPENING:
                self._aims.worker.has_hung = True
            return [events.Kill(f"the worker was killed: it was {self.phase.value} for too long")]
        if self.phase is Phase.RESTING:
            self.phase = Phase.NONE
        self._aims.worker.lingers = False
        return []

    # actions

    def _write(self) -> list[events.Action]:
        """Return the action that writes what xenstore lacks, if anything."""
        if self.sight.keys is None or self.sight.ours is _S.UNKNOWN:
            return []
        keys, before = self.sight.keys, self.sight.ours
        wanted = {
            **self._aims.keys(self.path.kind),
            "state": str(self._aims.state().value),
        }  # the state comes last: it says "read the rest"
        missing = {key: value for key, value in wanted.items() if keys.get(key) != value}
        if "sectors" in missing and before is _S.CONNECTED:
            missing["state"] = wanted["state"]  # a frontend looks at the size again when the state is written
        params = keys["params"] if "params" in missing else None
        write = events.Write(missing, before, params, self.sight.mark)
        self.sight.take_as_written(missing)
        return [write] if missing else []

    def _goal(self) -> Goal:
        """Return how far the worker should be. A service that stops only finishes what a dead worker left."""
        goal = self._aims.goal()
        return Goal.NONE if self._is_stopping and not (self._is_unfinished and goal is Goal.SERVE) else goal

    def _move(self) -> list[events.Action]:
        """Return the action that brings the worker nearer to its goal, by `MOVES`."""
        if self.is_leaving or not (self.sight.has_looked or self._is_stopping):
            return []
        former = self.phase
        move, self.phase = MOVES.get((former, self._goal()), (None, former))
        match move:
            case Move.START if self.sight.spec is not None:
                self._aims.worker.serves, self._limit = self.sight.spec, _NO_LIMIT  # a successor has its own
                return [
                    events.Start(self.sight.spec, self._reasons[Reason.FLUSH_FAILED] if self._aims.is_joined() else "")
                ]
            case Move.JOIN:
                join = self._aims.join()
                for cause in (Cause.JOIN,) if join.goes_on else (Cause.JOIN, Cause.FRESH):
                    self._clear(cause)
                return [join]
            case Move.LEAVE:
                return [events.Leave()]
            case Move.CLOSE if former in _OPENING and self._has_to_wait():
                return [_kill_who_waits()]
            case Move.CLOSE | Move.HAND_OVER:
                return [events.Close(move is Move.HAND_OVER, goes_on=self._is_stopping and self._aims.goes_on())]
        return []

    def _set_limit(self) -> list[events.Action]:
        is_forced = self.sight.is_over and self.phase in (Phase.CLOSING, Phase.RETIRING)
        lingers = self._aims.worker.lingers
        if self._limit == (self.phase, is_forced, lingers):
            return []
        self._limit = (self.phase, is_forced, lingers)
        if lingers and self.phase is Phase.SERVING:
            return [events.Limit(LINGER_S, QUIET_S)]
        limit_s = self._backoff.rest_s if self.phase is Phase.RESTING else LIMIT_S.get(self.phase)
        return [events.Limit(FORCED_LIMIT_S if is_forced else limit_s)]

    def _forget(self) -> list[events.Action]:
        has_stopped = self._is_stopping and self._goal() is Goal.NONE
        is_done = self.phase is Phase.NONE and (self.sight.is_over or has_stopped)
        return [events.Forget()] if self.is_leaving or is_done else []
