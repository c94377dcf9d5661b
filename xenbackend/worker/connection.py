"""A frontend being served: its devices, rings and engine, from Connect to Disconnected.

Must not parse a request or know a driver. Everything acquired here is released here, in reverse order, whatever
happens in between.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack
from weakref import WeakMethod

from xenbackend import counters
from xenbackend.blkif.abi import LAYOUTS, SECTOR, ring_entries
from xenbackend.blkif.request import Decoder
from xenbackend.blkif.ring import BackRing, RingOverflow
from xenbackend.block.chain import Chain
from xenbackend.block.driver import Geometry
from xenbackend.block.policy import Policy
from xenbackend.block.request import Request
from xenbackend.journal import RingJournal, poison, poisoned
from xenbackend.kernel.fence import is_strongly_ordered
from xenbackend.kernel.ports import EventChannels, GrantTable, Host
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.messages import Connect, Halted, Paused, RingParameters, Trouble
from xenbackend.worker.channel import Voice
from xenbackend.worker.counters_writer import CountersWriter
from xenbackend.worker.engine import Engine
from xenbackend.worker.grants import CopiedGrants, PersistentGrants
from xenbackend.worker.holds import Hold
from xenbackend.worker.polling import Poller
from xenbackend.worker.queue import Queue
from xenbackend.worker.retries import Retries

SAFETY_POLL_S = 1.0  # a second line against a lost wake-up; what it finds is counted, and expected to be nothing
_PATIENCE = 8  # events without work before the next one is made to wait
_MAX_DELAY_S = 0.01


class EventChannel:
    """One ring's event channel. A frontend that kicks without giving work waits longer and longer to be heard."""

    def __init__(self, events: EventChannels, port: int, reactor: Reactor, on_halt: Callable[[str], None]) -> None:
        self.port = port
        self.ring: BackRing
        self.halted = on_halt
        self.has_fired = True  # and is masked until it is armed again; it is when it is bound
        self._events = events
        self._reactor = reactor
        self._seen = 0
        self._in_vain = 0

    def notify(self) -> None:
        """Kick the frontend."""
        self._events.notify(self.port)

    def rearm(self) -> None:
        """Let the frontend kick us again."""
        if not self.has_fired:
            return
        self.has_fired = False
        consumed = self.ring.consumed
        if consumed != self._seen:
            self._seen = consumed
            self._in_vain = 0
        else:
            self._in_vain += 1
            if self._in_vain > _PATIENCE:
                delay_s = min(_MAX_DELAY_S, 1e-4 * 2 ** min(self._in_vain - _PATIENCE, 10))
                self._reactor.call_later(delay_s, self._unmask_late)
                return
        self._events.unmask(self.port)

    def _unmask_late(self) -> None:
        if self._events is not None:
            self._events.unmask(self.port)

    def close(self) -> None:
        """Forget the device: a late timer finds nothing to do."""
        self._events = None  # type: ignore[assignment]  # nothing asks for them any more


class Connection:
    """The rings of one frontend, served through one open chain."""

    def __init__(
        self,
        *,
        host: Host,
        reactor: Reactor,
        domid: int,
        agreed: Connect,
        rejoins: bool,
        geometry: Geometry,
        journal: memoryview,
        submit: Callable[[list[Request]], None],
        kick: Callable[[], object],
        poller: Poller,
        policy: Policy,
        voice: Voice,
    ) -> None:
        """Map the rings and bind the channels; serving begins with the next pass of the loop.

        `agreed` is what the frontend offers. `rejoins`: go on where a predecessor stopped; else the rings are new.
        `submit` is the chain's top, and `kick` starts the requests that were queued below it.

        Raises: KernelError, where the frontend's pages or port cannot be had; then nothing is left behind.
        """
        self._reactor = reactor
        self.agreed = agreed
        self.halted = self.paused = self.trouble = ""  # sentences of what is wrong now
        self._rejoins = rejoins
        self._geometry = geometry
        self._journal = journal
        self._voice = voice
        self._layout = LAYOUTS[agreed.protocol]
        self._suspects: dict[Queue, int] = {}
        self._closed = False
        self._by_port: dict[int, tuple[EventChannel, Queue]] = {}
        kept = Retries(policy, reactor.now, reactor.call_later, self._tell_trouble)
        with ExitStack() as undo:
            table = host.open_grants(domid)
            undo.callback(table.close)
            copied = CopiedGrants(table, host.allocate)
            grants = PersistentGrants(table, copied) if agreed.persistent else copied
            undo.callback(grants.close)
            self.engine = Engine(submit, kick, grants, poller, reactor.call_soon, voice, self._pause, kept)
            self._counters = CountersWriter(journal[: counters.SIZE], self.engine)
            self._open_rings(undo, host, table, domid)
            self._undo = undo.pop_all()
        if not (rejoins or agreed.goes_on):
            poison(journal, 0)  # whoever begins anew goes by what he finds
        elif poisoned(journal):
            self.engine.flush_failed(poisoned(journal))
        self._poll()

    def hold_lost(self, sentence: str) -> None:
        """Serve nothing: the disk lost something earlier, as `sentence` says."""
        self._say_paused(sentence)
        self.engine.holds.add(Hold.FLUSH)

    def resume(self) -> None:
        """Serve on after an administrator's pause, or a flush that failed; what failed is tried again now."""
        poison(self._journal, 0)
        self.paused = ""
        self.engine.let_go(Hold.PAUSE)
        self.engine.let_go(Hold.FLUSH)

    def go_on_through(self, chain: Chain) -> None:
        """Serve on through another chain, which the caller has wired to the engine."""
        for _, queue in self._by_port.values():
            queue.decoder.sectors = chain.geometry.size // SECTOR
        self.engine.let_go(Hold.SWAP, chain.submit)

    def disconnect(
        self, flush: Callable[[Callable[[], None]], None], then: Callable[[], None], *, hands_over: bool = False
    ) -> None:
        """Drain, make everything durable by `flush`, release everything, then call `then`.

        With `hands_over` what is held back stays unanswered, for a successor.
        """
        self.engine.hold(Hold.END, lambda: flush(lambda: self._release(then, hands_over=hands_over)))

    def publish_counters(self) -> None:
        """Bring the counters' page up to date, which is done once a second anyhow."""
        self._counters.publish()

    def _pause(self, code: int) -> None:
        poison(self._journal, code)  # first of all: what was lost is reported only once, and we may die any moment
        self._say_paused(f"a flush failed ({errno.errorcode.get(code, code)}); the disk is paused")

    def _say_paused(self, sentence: str) -> None:
        self.paused = sentence
        self._voice.alarm(self.paused)
        self._voice.say(Paused(self.paused))

    def _tell_trouble(self, sentence: str) -> None:
        self.trouble = sentence
        if sentence:
            self._voice.alarm(sentence)
        self._voice.say(Trouble(sentence))

    def _halt(self, ring: int, why: str) -> None:
        self.halted = f"ring {ring} was stopped: {why}"
        self._voice.say(Halted(ring, why))

    def _release(self, then: Callable[[], None], *, hands_over: bool) -> None:
        self._closed = True
        self._undo.callback(self._counters.publish)
        if not hands_over:
            self._undo.callback(self.engine.fail_held)  # is called first
        try:
            self._undo.close()
        finally:  # whatever goes wrong now, the chain has to be closed and the image let go
            self.engine.queues.clear()  # they know us: without this, only the garbage collector would find us
            self._by_port.clear()
            then()

    def _open_rings(self, undo: ExitStack, host: Host, table: GrantTable, domid: int) -> None:
        self._events = host.open_events(domid)
        undo.callback(self._events.close)
        for number, parameters in enumerate(self.agreed.rings):
            self._open_ring(undo, table, number, parameters, host)
        self._reactor.add(self._events.fileno(), self._take_events)
        undo.callback(self._reactor.remove, self._events.fileno())
        self._reactor.before_sleep(self.engine.look_again)
        undo.callback(self._reactor.remove_hook, self.engine.look_again)

    def _open_ring(
        self, undo: ExitStack, table: GrantTable, number: int, parameters: RingParameters, host: Host
    ) -> None:
        order = (len(parameters.grefs) - 1).bit_length()
        mapping = table.map(parameters.grefs, writable=True)
        undo.callback(mapping.release)
        entries = ring_entries(self._layout, order)
        ring = BackRing(mapping.view, self._layout, entries, host.fence, is_strongly_ordered=is_strongly_ordered())
        journal = RingJournal(self._journal, number, self._layout.slot_size)
        if not self._rejoins:
            journal.begin(ring.size, ring.consumed)
        decoder = Decoder(
            self._layout,
            self._geometry.size // SECTOR,
            read_only=self._geometry.read_only,
            can_flush=self._geometry.can_flush,
            can_discard=self._geometry.can_discard and self.agreed.can_discard,
            max_segments=self.agreed.max_segments,
        )
        port = self._events.bind(parameters.event_channel)
        undo.callback(self._events.unbind, port)
        channel = EventChannel(self._events, port, self._reactor, lambda why: self._halt(number, why))
        channel.ring = ring
        undo.callback(channel.close)
        queue = Queue(ring, journal, decoder, channel)
        undo.callback(queue.release)
        self.engine.queues.append(queue)
        self._by_port[port] = (channel, queue)
        if self._rejoins:
            self._go_on(queue, channel)

    def _go_on(self, queue: Queue, channel: EventChannel) -> None:
        try:
            records = queue.go_on()
        except RingOverflow as problem:
            queue.halt(str(problem))
            return
        if records:
            self.engine.go_on_with(records)
        channel.notify()  # the last kick may have died with the predecessor

    def _take_events(self) -> None:
        for port in self._events.pending():
            channel, queue = self._by_port[port]
            channel.has_fired = True
            self.engine.serve(queue)

    def _poll(self) -> None:
        """Look at idle rings once a second; work that waits there twice in a row was never announced to us."""
        if self._closed:
            return
        for queue in self.engine.queues:
            if queue.is_idle and not queue.halted and self._waits(queue):
                if self._suspects.get(queue) == queue.ring.consumed:
                    self._counters.missed_wakeups += 1
                    self.engine.serve(queue)
                else:
                    self._suspects[queue] = queue.ring.consumed
        self._counters.publish()
        poll = WeakMethod(self._poll)  # so that a timer does not keep a frontend that has gone
        self._reactor.call_later(SAFETY_POLL_S, lambda: (again := poll()) and again())

    def _waits(self, queue: Queue) -> bool:
        try:
            return queue.ring.available() > 0
        except RingOverflow:
            return True  # `serve` halts it
