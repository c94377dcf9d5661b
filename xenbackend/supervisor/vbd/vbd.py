"""One vbd in service: looks at its nodes, gives events to its automaton, and carries out the actions that follow.

Must not decide anything: what follows from what is in `device`, what a worker may say in `link`, what operators may ask
in `orders`. A path has one object, which has one worker; an object that was forgotten does nothing any more.

A guest cannot make this grow: two flags say that a look is due, however many events there were.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

from xenbackend import __version__, counters, journal
from xenbackend.blkif.features import MAXIMA, parse_frontend
from xenbackend.blkif.handshake import name, parse_state
from xenbackend.errors import ConfigError, GuestError, KernelError, StoreError, XenbackendError, is_shortage
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer, Reply
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.fleet import Worker
from xenbackend.supervisor.service.status import describe_briefly
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.arrival import Arrival
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.ending import Ending
from xenbackend.supervisor.vbd.exchanges import Exchanges
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import What
from xenbackend.supervisor.vbd.limit import Limit
from xenbackend.supervisor.vbd.link import Link, StorageHangs
from xenbackend.supervisor.vbd.lives import Lives
from xenbackend.supervisor.vbd.negotiation import connect_of
from xenbackend.supervisor.vbd.openings import Openings
from xenbackend.supervisor.vbd.orders import Orders
from xenbackend.supervisor.vbd.phase import Phase
from xenbackend.supervisor.vbd.reconnecting import Reconnecting
from xenbackend.supervisor.vbd.vbd_log import VbdLog
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes
from xenbackend.supervisor.xenstore.paths import VbdPath

_RETRY_S = 1.0  # after xenstore refused something although it is there, or after a bug of ours


class Vbd:
    """One vbd, its worker, and what its workers leave to each other."""

    def __init__(
        self,
        path: VbdPath,
        context: Context,
        inherited: Mapping[What, int] | None = None,
        on_forgotten: Callable[[Vbd], None] = lambda _: None,
    ) -> None:
        """Begin, or go on with the descriptors that an earlier service left.

        `on_forgotten` is called once, when nothing of the vbd is left. Raises: KernelError.
        """
        self.path = path
        self.since = context.time()  # of the last change of our state
        self.is_forgotten = False
        self._context = context
        self._on_forgotten = on_forgotten
        self.log = VbdLog(path, context.loop.now)
        self.handover = Handover(context.keeper, path, inherited, self.log.warn)
        try:
            self._compose(context, is_heir=bool(inherited))
        except Exception as problem:
            (self.handover.leave if is_shortage(problem) else self.handover.close)()
            raise
        try:
            self._begin()
        except Exception as problem:
            self.abandon("the service could not continue it", leaves=is_shortage(problem))
            raise

    def _compose(self, context: Context, *, is_heir: bool) -> None:
        path = self.path
        if not is_heir:
            self.handover.note(begun_after=context.ledger.last)
        self._nodes = VbdNodes(context.store, path, self.log.warn)
        self.ending = Ending(self, context, self._nodes, self.log)
        has_past = self.ending.find(is_heir=is_heir)
        self.device = Device(path, context.settings.limits, os.getpid(), has_past=has_past)
        self._openings = Openings(path, context, self.device, self.handover)
        self.link = Link(self, context.fleet, self._openings)
        self._reconnecting = Reconnecting(context.loop, self.link.ask, self._openings.may_reconnect)
        self.orders = Orders(self, context.settings.on_error, context.loop.now)
        self.exchanges = Exchanges(self.handover, self.orders, context.ledger, self.handle)
        self.lives = Lives(journal.progress(self.handover.page))
        self._must_look = {"node", "theirs"}
        self._look_at = context.loop.timer(self._look_if_due)
        expire, activity = partial(self.handle, events.Expired()), partial(journal.activity, self.handover.page)
        self._limit = Limit(context.loop, expire, activity, self.link.hear)
        self._events: deque[events.Event] = deque()
        self._arrival = Arrival(path, context, self.handover, self._has_arrived)

    @property
    def token(self) -> str:
        """The token of the watch on the frontend's state."""
        return self._nodes.token

    @property
    def worker(self) -> Worker | None:
        """The process that serves the vbd, None if there is none."""
        return self.link.worker

    def look_soon(self, *, node: bool = False, theirs: bool = False) -> None:
        """Look at the backend's directory, or only at the frontend's state, with the loop's next pass."""
        if self.is_forgotten:
            return
        self._must_look |= {each for each, is_meant in (("node", node), ("theirs", theirs)) if is_meant}
        if self._look_at.due is None or self._nodes.is_unwatched:  # else it is about to look, or has to wait
            self._look_at.set(self._context.loop.now())

    def handle(self, event: events.Event) -> None:
        """Give the automaton an event, and carry out the actions; events that these cause are handled in turn."""
        if self.is_forgotten:
            return
        self._events.append(event)
        if len(self._events) > 1:
            return  # called from within an action
        while self._events and not self.is_forgotten:
            self._guarded(self._handle_one, self._events[0])
            self._events.popleft()
        if not self.is_forgotten:
            self._guarded(self._show)
            self._guarded(self.orders.looked)
            if self.device.sight.hotplug and "node" not in self._must_look:
                self._guarded(self._arrival.tell, self.device)

    def hotplug(self, reply: Reply) -> None:
        """Serve the vbd, as a hotplug script asks. `reply` gets `Code.OK` once the chain is open, or why it is not."""
        self._arrival.scripts.append(reply)
        self._must_look.add("node")  # what was seen last may be of a former vbd in the same place
        if not self._arrival.is_under_way:  # else the directory may be away
            self._guarded(self._look)
        is_gone = self.is_forgotten or self.device.sight.is_over  # the registry brings the script to the next one
        if not (is_gone or self._arrival.takes_from_kernel()):
            self.handle(events.Called())

    def give_up_scripts(self) -> list[Reply]:
        """Return the waiting scripts, for the next vbd at this path."""
        return self._arrival.give_up()

    def stop(self, *, leaves: bool) -> None:
        """Finish and close, or leave the worker to the next service: see `events.Stop`."""
        self._guarded(self._arrival.give_back)
        self._guarded(self.ending.begin)
        self.handle(events.Stop(leaves, is_unfinished=self.handover.agreed() is not None))

    def abandon(self, sentence: str, *, leaves: bool = False) -> None:
        """Forget the vbd at once. The worker is killed, with `sentence` as the reason, or with `leaves` goes on."""
        self._guarded(self._arrival.give_back)
        self.device.is_leaving |= leaves
        if not leaves:
            self.link.kill(sentence)
        self._forget()

    def doubt(self) -> None:
        """Look at everything again and show it anew, because xenstore was away."""
        self._nodes.doubt()
        self._look_at.set(None)
        self.look_soon(node=True)

    def counters_page(self) -> memoryview | None:
        """Return a copy of the counters, `counters.SIZE` bytes, without asking the worker; None if there is none."""
        return memoryview(bytes(self.handover.page[: counters.SIZE])) if self.worker else None

    def chain_in_service(self) -> str:
        """Return the chain that the guest is served through, or would be; empty if the toolstack named none."""
        return self.handover.chain_in_service() or (self.device.sight.spec.chain if self.device.sight.spec else "")

    # what the worker says, from `link`

    def stands(self, standing: messages.Standing, *, is_last: bool) -> None:
        """Handle a standing, if its chain is possible. One from before the last order counts only for its chain."""
        if not self.exchanges.believes(standing):
            self.link.breach("it says that a chain is in service that nobody asked for")
            return
        if not is_last:
            return
        is_adopted = self.device.phase is Phase.ADOPTING
        if standing.stage is messages.Stage.SERVING:
            self._served()
        self._openings.saw_export(standing.export)
        self.handle(standing)
        self._reconnecting.stands(standing)
        if is_adopted:
            self.exchanges.conclude(standing)
        if self.device.sight.must_compare:
            self.look_soon(theirs=True)

    def ends(self, worker: Worker, sentence: str) -> None:
        """Take note that the worker has ended."""
        if worker.has_broken_protocol:
            self.log.say("error", "a worker broke the protocol and is killed", worker=str(worker.pid), reason=sentence)
        self.handover.forget_worker()
        if self.device.sight.has_looked and not self.device.is_promised():
            self.handover.files.let_go()  # a chain that could not be opened may be put right by another file
        self._openings.remove_export()
        self._reconnecting.stop()
        now, was_asked = self._context.loop.now(), self.device.phase in (Phase.CLOSING, Phase.RETIRING)
        progress, is_breach = journal.progress(self.handover.page), worker.has_broken_protocol
        has_progressed = self.lives.end(now, progress, was_asked=was_asked, is_breach=is_breach)
        self._guarded(self.exchanges.settle)
        self.handle(events.Ended(sentence, has_progressed, self.handover.agreed() is not None, self.lives.is_hasty))

    def fault(self, bug: Exception) -> None:
        """Report an exception that was raised while this vbd was handled. A fresh look may put things right."""
        bug.add_note(f"while {self.path} was handled")
        self._context.loop.bug(bug)
        self._look_again()

    # the steps

    def _begin(self) -> None:
        self.device.doubt(self.ending.doubt)
        if self.handover.worker is None:
            self.exchanges.settle()  # the worker that was to put another chain in has gone
        else:
            self.exchanges.follow()
            self.link.adopt(self.handover.worker)
            self.handover.worker = None  # its descriptors are the link's now
            self.handle(events.Inherited())
            self.link.order(messages.Report)
        self._look_if_due()

    def _handle_one(self, event: events.Event) -> None:
        error = self.device.error
        actions = self.device.handle(event)
        self._guarded(self._nodes.show_error, self.device.error)  # before the state, which makes people look for it
        for action in actions:
            self._guarded(self._perform, action)
        if self.device.error not in ("", error):
            self.log.say("error", self.device.error)

    def _perform(self, action: events.Action) -> None:
        match action:
            case events.Write():
                self._write(action)
            case events.Start():
                self._start(action)
            case events.Join():
                self._join(action)
            case events.Leave():
                self.link.order(messages.Leave)
            case events.Close():
                self.link.order(lambda number: messages.Close(number, action.hands_over, action.goes_on))
            case events.Kill():
                self.link.kill(action.sentence, is_breach=action.is_breach)
            case events.Limit():
                self._limit.set(action, self.worker)
            case events.Forget() if self.ending.may_end():
                self._forget()

    def _write(self, action: events.Write) -> None:
        if not self._nodes.write(action):
            self.look_soon(node=True)
            return
        self.device.sight.was_written(action.keys)
        state = action.keys.get("state")
        if state is not None and parse_state(state) is not action.state:
            self.since = self._context.time()
            self.log.say("info", name(parse_state(state)), frontend=name(self.device.sight.theirs))

    def _start(self, action: events.Start) -> None:
        """Start a worker. If that fails, go on as if the worker had died."""
        try:
            self._open(action)
        except Exception as problem:
            if self.worker is None:
                self.handle(events.Ended(str(problem), has_waited=isinstance(problem, StorageHangs)))
            else:
                self.link.kill(str(problem))
            if not isinstance(problem, ConfigError | KernelError):
                raise

    def _open(self, action: events.Start) -> None:
        """Start a worker, and have it open the chain. Raises: ConfigError, KernelError."""
        spec, settings = action.spec, self._context.settings
        self.handover.poison_for(action.lost)
        fd, memories = self.handover.descriptors(spec.chain)
        worker = self.link.start(spec.chain)
        restarts = self.handover.notes.restarts + self.lives.has_died
        self.handover.note(program=__version__, restarts=restarts)
        self.lives.start(self._context.loop.now())
        if self.handover.agreed():
            worker.boost()
        worker.when_there(lambda: self.handover.keep_worker(*worker.descriptors))
        boots = self.device.may_boot and self._nodes.boots_by_device_model()
        self.link.order(
            lambda number: messages.Open(
                number=number,
                vbd=str(self.path),
                host=settings.host,
                frontend_domid=self.path.frontend_domid,
                chain=spec.chain,
                read_only=spec.read_only,
                shareable=spec.shareable,
                resumes=self._openings.resumes(has_opened="hotplug-status" in (self.device.sight.keys or {})),
                memories=list(memories),
                poll_us=settings.poll_us,
                may_wait=self._nodes.may_be_incoming(self.device.sight.ours),
                export=self._openings.export if boots else "",
                policy=self.orders.policy,
                is_paused=self.handover.notes.paused is not None,
            ),
            [fd, *memories.values()],
        )

    def _join(self, action: events.Join) -> None:
        """Have the rings served that the frontend offers, or the agreed ones if it is served already."""
        if self._arrival.takes_from_kernel():
            self.handle(events.Postponed())
            return
        agreed = self.handover.connect() if action.goes_on else None
        try:
            # A connected frontend goes by what an earlier service offered.
            chosen = parse_frontend(self._nodes.read_frontend, MAXIMA if action.goes_on else self._arrival.limits)
        except GuestError as error:
            if agreed is None:
                self.handle(events.Refused(str(error)))
            else:  # what the frontend writes now cannot take back what was agreed
                self._serve(None)
            return
        except StoreError:
            self.handle(events.Postponed())
            raise
        connect = connect_of(chosen, action)
        self._serve(None if agreed is not None and agreed.rings == connect.rings else connect)

    def _serve(self, connect: messages.Connect | None) -> None:
        try:
            self.link.order(lambda number: messages.Serve(number, connect))
        except KernelError as error:  # no opener could be started
            self.link.kill(str(error))

    def _served(self) -> None:
        """Forget which files were refused, end the worker's boost, and log how long a guest has waited for it."""
        self.handover.files.forget_refusals()
        if self.worker is not None:
            self.worker.unboost()
        if self.lives.ended:
            waited_s = self._context.loop.now() - self.lives.ended
            self.log.say("info", "another worker serves", after_ms=f"{1000 * waited_s:.0f}")
        self.lives.ended = 0.0

    def _forget(self) -> None:
        leaves = self.device.is_leaving
        sentence = f"{self.path.disk}: the service {'is being replaced; ask again' if leaves else 'has released it'}"
        self.is_forgotten = True
        self._limit.set(events.Limit(None))
        self._look_at.set(None)
        self._reconnecting.stop()
        self._guarded(partial(self.orders.give_up, sentence, leaves=leaves))
        self.link.let_go(sentence, leaves=leaves)
        self._guarded(self.ending.end)
        if leaves:
            self._guarded(self.handover.leave)  # the registry removes what is shown of all vbds at once
        else:
            goes_on = not self.device.sight.is_over and (self.device.is_promised() or not self.device.sight.has_looked)
            self._guarded(self.handover.close)
            self._guarded(partial(self._nodes.forget, goes_on=goes_on))
        self._on_forgotten(self)

    def _look_if_due(self) -> None:
        if self._must_look and not self._arrival.is_under_way and self._context.store.is_connected:
            self._guarded(self._look)

    def _look(self) -> None:
        must_look, self._must_look = self._must_look, set()
        self._look_at.set(None)
        try:
            keys = self._nodes.keys() if "node" in must_look else self.device.sight.keys
            seen = self._nodes.look(keys, self.handover.connect() if self.device.sight.must_compare else None)
        except StoreError:
            self._must_look |= must_look
            raise
        if seen.keys is not None:
            self.ending.saw(seen.keys)
        self.handle(seen)
        if self._nodes.is_unwatched and self._look_at.due is None:
            self._look_again("theirs")

    def _guarded(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function. If it fails because of xenstore or a bug of ours, look again later, to put things right."""
        try:
            function(*arguments)
        except StoreError as error:
            self._look_again()
            if self._context.store.is_connected:
                self.log.say("warning", str(error))
        except Exception as bug:
            self.fault(bug)

    def _look_again(self, what: str = "node") -> None:
        if not self.is_forgotten:
            self._must_look.add(what)
            self._look_at.set(self._context.loop.now() + _RETRY_S)

    def _show(self) -> None:
        if self.device.sight.has_looked:  # else what an earlier service noted there is not known yet
            self._nodes.note_files(self.handover.notes.chain, self.handover.files.identities())
        self._nodes.show_status(describe_briefly(self))

    def _has_arrived(self, problem: XenbackendError | None) -> None:
        """Go on once the vbd is ours alone, or say why it is not."""
        self._must_look.add("node")
        if problem is not None:
            self.log.say("error", str(problem))
            self._arrival.answer(Answer(Code.FAILED, sentence=str(problem)))
            self.look_soon(node=True)
            return
        self._guarded(self._look)
        if self._arrival.scripts:
            self.handle(events.Called())
