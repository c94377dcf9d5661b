"""One vbd as a pure automaton: an event in, a list of actions out.

Must not perform an action, read a clock or know a socket.

It keeps what was last seen of both ends (`sight`) and what the worker last said, and after every event derives two
things anew: which keys should stand in the backend's directory, and what the worker should be doing. Events are
therefore hints only: one that is lost, doubled or late does no harm, and a store that was away is put right by the next
look at it. `phase.MOVES` says what the worker is told, `phase.STANDINGS` what follows from what it says,
`blkif.handshake.STEPS` what to do in each pair of states, `reasons.ROWS` why a disk is not served. On top of them:

- No frontend is served before the toolstack's hotplug script has come: a toolstack waits to see exactly InitWait before
  it starts one. That it came is kept as ``hotplug-status``, so that the next service knows; its value, ``connected``
  once the chain is open or ``error``, is what the script is told. Until it is told, a frontend that closes waits too.
- A chain that cannot be opened then leaves the state alone, for the same reason, and its sentence in ``hotplug-error``.
- Closed is written when no worker is left, so that the image is free, whichever side closed first. When the frontend
  begins anew it is offered the disk at once, and another worker is started.
- A worker that dies has a successor. A guest that is connected does not see it: our state stays Connected, and the
  successor serves the same rings on. Workers that die one after the other, without a single answer to the guest, come
  later and later, and then no more: the guest waits until an administrator says `xenbackend resume`. Without a guest
  the vbd goes to Closed, with a sentence, until its frontend begins anew. What cannot be done is tried again for ever,
  if a guest waits for it or the toolstack was told that it has the disk.
- A guest that waits is served neither from another file than before nor from one that has shrunk: that takes a
  `xenbackend resume`.
- While the worker exports its disk to a device model, from which a guest boots before its own driver starts, a
  toolstack finds that by ``physical-device-path``: as QEMU's URL, for kind ``vbd3`` as the socket's path.
- ``online`` = 0 is the toolstack's request to go away: that ends in Closed. A frontend that is still connected is
  served until it has closed. One whose directory was taken away is served on until it is quiet, or for 5 s: Linux
  flushes a file system that is mounted when its disk goes, and waits for that for ever.
- A node that is gone, or was made anew in the same place, ends the vbd: the worker is closed, soon or by force, and
  nothing is written any more.
- A service that stops leaves a connected vbd's state alone: the next one serves the same ring, and the guest only sees
  a pause. The next service knows nothing of requests that a dead worker had taken, so another worker does them first.
  That a flush failed stands in ``flush-failed``, for a service that finds nothing else of the disk's past.
- Where another chain took the place of the one in service, ``params`` follows, unless the toolstack wants a third one.
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
    """Return what to say of a disk whose opener waits, empty: it does not."""
    name = printable(waits.name)
    if not name:
        return ""
    if waits.makes_key:
        return f"the key is being made of {name}, which takes seconds, and one disk does it at a time; then it goes on"
    return f"{name} cannot be opened: its storage does not answer; the disk goes on when it does"


def _kill_who_waits() -> events.Kill:
    return events.Kill("the worker was killed: it was not needed any more, and waited for a file or a key")


class Device:
    """The automaton of one vbd; `sight` is what it has seen of it."""

    def __init__(self, path: VbdPath, limits: Limits, pid: int = 0, *, has_past: bool = False) -> None:
        """Begin with nothing known.

        `pid` is the service's, by which `xentop` finds the counters; `has_past`: an earlier service had the vbd.
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
        """True while no frontend was ever connected, as far as the store tells.

        What a device model finds stands there from when the chain is first open until a frontend is connected.
        """
        was_open = self.sight.hotplug == "connected" and EXPORT not in (self.sight.keys or {})
        return self.sight.ours in (_S.UNKNOWN, _S.INITIALISING, _S.INIT_WAIT) and not was_open

    @property
    def error(self) -> str:
        """A sentence for the operator, empty while all is well."""
        return self._reasons[self._reasons.first] if self._reasons.first else ""

    @property
    def is_mistaken(self) -> bool:
        """Whether the chain is a mistake of whoever named it, where that is why the disk is not served."""
        is_unusable = bool(self._reasons[Reason.CANNOT_OPEN]) and self._is_mistake
        return is_unusable or bool(self._reasons[Reason.BAD_KEYS])

    @property
    def reason(self) -> str:
        """One word for `error`, for programs."""
        return self._reasons.word()

    def has_found_another_file(self) -> bool:
        """Return whether it is not served because a name means another file than the one that was served."""
        return bool(self._reasons[Reason.OTHER_FILE])

    def is_undecided(self) -> bool:
        """Return whether it is not served because nobody knows which of two chains has the guest's data."""
        return bool(self._reasons[Reason.UNDECIDED])

    def doubt(self, sentence: str) -> None:
        """Serve nothing until an administrator says by which chain; an empty sentence changes nothing."""
        self._reasons.say(Reason.UNDECIDED, sentence)

    def waits_without_worker(self) -> bool:
        """Return whether somebody waits for the disk, and no worker does anything about that now."""
        return self.phase in (Phase.NONE, Phase.RESTING) and self.sight.is_online and self.is_promised()

    def is_promised(self) -> bool:
        """Return whether a guest waits for the disk, or the toolstack was told that it is there."""
        return self.is_waited_for() or self.sight.hotplug == "connected"

    def is_waited_for(self) -> bool:
        """Return whether a guest has rings that we serve, or will again: it must see nothing but a delay."""
        return self._aims.is_waited_for()

    def handle(self, event: events.Event) -> list[events.Action]:
        """Take an event, and return what to do about it, in order."""
        killed = self._hear(event)
        if isinstance(event, events.Postponed):
            return self._set_limit()
        self._note(event)
        if self.phase is Phase.RESTING and (self._goal() is Goal.NONE or not self._backoff.rest_s):
            self.phase = Phase.NONE
        return [*killed, *self._write(), *self._move(), *self._set_limit(), *self._forget()]

    # what came

    def _hear(self, event: events.Event) -> list[events.Action]:
        """Take what is about the worker."""
        match event:
            case messages.Standing() if self.phase not in (Phase.NONE, Phase.RESTING):
                return self._stand(event)
            case events.Expired():
                return self._expire()
            case events.Waits():
                return self._wait(event)
            case events.Inherited():
                self.phase = Phase.ADOPTING
                self.sight.had_state = self.sight.had_keys = True
            case events.Refused() if self.phase is Phase.CONNECTING:
                self._fail(event.sentence, errno.EINVAL)
            case events.Postponed() if self.phase is Phase.CONNECTING:
                self.phase = Phase.OPEN
            case events.Ended():
                self._end(event)
        return []

    def _note(self, event: events.Event) -> None:
        """Take what is about the vbd."""
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
        for cause in causes:
            self._clear(cause)
        if Cause.KEYS in causes:
            self._reasons.say(Reason.BAD_KEYS, self.sight.problem)
            self._aims.worker.serves = self._as_shown(self._aims.worker.serves)
        if is_first and not self._reasons[Reason.FLUSH_FAILED]:
            self._reasons.say(Reason.FLUSH_FAILED, (self.sight.keys or {}).get(LOST, ""))  # as an earlier service knew

    def _as_shown(self, serves: Spec | None) -> Spec | None:
        """Return what a worker serves, with what no worker knows, and only the guest is told, as the keys say it."""
        return self.sight.spec if serves and self.sight.spec and serves.is_served_like(self.sight.spec) else serves

    def _exchange(self, exchanged: events.Exchanged) -> None:
        if self._aims.worker.serves is not None:
            self._aims.worker.serves = replace(self._aims.worker.serves, chain=exchanged.chain)
        self._told_of = exchanged.chain
        self.sight.exchange(exchanged)

    def _stand(self, standing: messages.Standing) -> list[events.Action]:
        """Take where the worker stands: `STANDINGS`; what cannot be is a breach of the protocol."""
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
                self.phase = Phase.OPEN  # and is closed next; nothing of it is shown
                return []
        worker, self.phase = self._aims.worker, STANDINGS[former][stage]
        if former is Phase.ADOPTING:
            chain = standing.chain if standing.layers else ""
            worker.serves = self._as_shown(Spec(chain, standing.read_only, standing.shareable, False, False))
        self._believe(standing)
        if self.phase is Phase.SERVING and former is not Phase.SERVING:
            self._clear(Cause.SERVED)
            self._backoff.served()
            worker.has_rings, self._is_unfinished = True, False
        elif former is Phase.DISCONNECTING and self.phase is Phase.OPEN:
            worker.has_rings = False
        return []

    def _was_told_of(self, chain: str) -> bool:
        """Return whether it is this chain's size that the guest has read, as far as anybody knows.

        Where the toolstack names another chain below a guest, as for a medium that is changed, the guest is told anew.
        """
        return self._told_of in ("", chain)

    def _believe(self, standing: messages.Standing) -> None:
        """Show what the worker says of itself; what one that does not serve says nothing of still holds."""
        worker = self._aims.worker
        worker.layers = standing.layers or worker.layers
        self._told_of = standing.chain if standing.layers else self._told_of
        worker.export = standing.export
        self._reasons.say(Reason.TROUBLE, standing.trouble)
        for reason, sentence in {Reason.FLUSH_FAILED: standing.flush_failed, Reason.HALTED: standing.halted}.items():
            if sentence or standing.stage is Stage.SERVING:
                self._reasons.say(reason, sentence)

    def _fail(self, sentence: str, code: int) -> None:
        """Take note of what the worker could not do. The process is still there, and is told to close next."""
        is_opening, self.phase = self.phase is Phase.OPENING, Phase.OPEN
        is_wanted = self.is_waited_for() or (is_opening and self.sight.hotplug == "connected")
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
        self._is_unfinished = ended.is_unfinished and not worker.is_retrying  # one that could not would not be able to
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
                in_a_row = f"{self._backoff.deaths} in a row; `xenbackend resume` starts another one"
                self._reasons.say(Reason.GIVEN_UP, f"{ended.sentence}, {in_a_row}")

    def _wait(self, waits: events.Waits) -> list[events.Action]:
        """Take note of what the opener waits for, or that it is over."""
        had_to_wait, sentence = self._has_to_wait(), _sentence(waits)
        self._reasons.say(Reason.STORAGE, "" if waits.makes_key else sentence)
        self._reasons.say(Reason.KEY, sentence if waits.makes_key else "")
        if had_to_wait and not waits.name:
            self._limit = _NO_LIMIT  # from here on the time is the worker's again
        return [_kill_who_waits()] if waits.name and self.phase is Phase.CLOSING else []

    def _has_to_wait(self) -> bool:
        return bool(self._reasons[Reason.STORAGE] or self._reasons[Reason.KEY])

    def _expire(self) -> list[events.Action]:
        if self.phase in _OPENING and self._has_to_wait():
            return []  # another worker would wait as well, and leave one more process that hangs
        if self.phase in LIMIT_S:
            if self.phase is Phase.OPENING:
                self._aims.worker.has_hung = True
            return [events.Kill(f"the worker was killed: it was {self.phase.value} for too long")]
        if self.phase is Phase.RESTING:
            self.phase = Phase.NONE
        self._aims.worker.lingers = False
        return []

    # what follows

    def _write(self) -> list[events.Action]:
        """Return what the store lacks."""
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
        """Return how far the worker should be: in a service that stops, as far as is needed for what was left."""
        goal = self._aims.goal()
        return Goal.NONE if self._is_stopping and not (self._is_unfinished and goal is Goal.SERVE) else goal

    def _move(self) -> list[events.Action]:
        """Return the worker's next step towards the goal: `MOVES`."""
        if self.is_leaving or not (self.sight.has_looked or self._is_stopping):
            return []
        former = self.phase
        move, self.phase = MOVES.get((former, self._goal()), (None, former))
        match move:
            case Move.START if self.sight.spec is not None:
                self._aims.worker.serves = self.sight.spec
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
                return [events.Close(hands_over=move is Move.HAND_OVER)]
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
