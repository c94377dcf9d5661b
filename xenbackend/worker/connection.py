"""A frontend being served: its devices, rings and engine, from `Serve` to `Leave`.

Must not parse a request or know a driver. Everything acquired here is released here, in reverse order, whatever
happens in between.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakMethod

from xenbackend import counters
from xenbackend.blkif.abi import LAYOUTS, ring_entries
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
from xenbackend.loop.steps import Step
from xenbackend.protocol.messages import Connect, RingParameters
from xenbackend.units import SECTOR
from xenbackend.worker.channel import Reports
from xenbackend.worker.counters_writer import CountersWriter
from xenbackend.worker.engine import Engine
from xenbackend.worker.grants import CopiedGrants, PersistentGrants
from xenbackend.worker.holds import Hold
from xenbackend.worker.polling import Poller
from xenbackend.worker.queue import Queue
from xenbackend.worker.retries import Retries

SAFETY_POLL_S = 1.0  # a second defence against lost wake-ups; those that it finds are counted, and none is expected
_PATIENCE = 8  # events without work, after which the next one is delayed
_MAX_DELAY_S = 0.01


class EventChannel:
    """One ring's event channel. If a frontend notifies us without giving work, its events are delayed more and more."""

    def __init__(self, events: EventChannels, port: int, reactor: Reactor, on_halt: Callable[[str], None]) -> None:
        self.port = port
        self.ring: BackRing
        self.halted = on_halt
        self.has_fired = True  # masked until it is rearmed, as it is when it has just been bound
        self._events = events
        self._reactor = reactor
        self._seen = 0
        self._in_vain = 0

    def notify(self) -> None:
        """Notify the frontend."""
        self._events.notify(self.port)

    def rearm(self) -> None:
        """Let the frontend notify us again."""
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
        self._unmask()

    def _unmask_late(self) -> None:
        if self._events is not None:
            self._unmask()

    def _unmask(self) -> None:
        try:
            self._events.unmask(self.port)
        except Exception:
            self.has_fired = True  # still masked: the next `serve` of the ring tries again
            raise

    def close(self) -> None:
        """Forget the device, so that a late timer does nothing."""
        self._events = None  # type: ignore[assignment]  # only a late timer looks at it


@dataclass(frozen=True, slots=True)
class Peer:
    """The frontend, and what was agreed with it. `is_inherited`: continue where a predecessor stopped."""

    host: Host
    domid: int
    agreed: Connect
    is_inherited: bool = False


@dataclass(frozen=True, slots=True)
class Below:
    """Where requests go: the chain's top, and `kick`, which starts I/O that was queued below it."""

    geometry: Geometry
    submit: Callable[[list[Request]], None]
    kick: Callable[[], object]


class Connection:
    """The rings of one frontend, served through one open chain."""

    def __init__(
        self,
        peer: Peer,
        below: Below,
        reactor: Reactor,
        journal: memoryview,
        channel: Reports,
        poller: Poller,
        policy: Policy,
    ) -> None:
        """Map the rings and bind the channels; serving begins with the next pass of the loop.

        Raises: KernelError, if the frontend's pages cannot be mapped or its port not be bound; nothing is left then.
        """
        agreed = self.agreed = peer.agreed
        self.halted = self.trouble = ""  # sentences of what is wrong now
        self._is_inherited = peer.is_inherited
        self._reactor = reactor
        self._geometry = below.geometry
        self._journal = journal
        self._channel = channel
        self._layout = LAYOUTS[agreed.protocol]
        self._suspects: dict[Queue, int] = {}
        self._closed = False
        self._by_port: dict[int, tuple[EventChannel, Queue]] = {}
        retries = Retries(policy, reactor.now, reactor.call_later, self._tell_trouble)
        with ExitStack() as undo:
            table = peer.host.open_grants(peer.domid)
            undo.callback(table.close)
            copied = CopiedGrants(table, peer.host.allocate)
            grants = PersistentGrants(table, copied) if agreed.persistent else copied
            undo.callback(grants.close)
            self.engine = Engine(
                below.submit, below.kick, grants, poller, reactor.call_soon, channel, self._flush_failed, retries
            )
            self._counters = CountersWriter(journal[: counters.SIZE], self.engine)
            self._open_rings(undo, peer, table)
            self._undo = undo.pop_all()
        if not (peer.is_inherited or agreed.goes_on):
            poison(journal, 0)  # a guest that starts afresh goes by what the disk holds
        elif poisoned(journal):
            self.engine.flush_failed(poisoned(journal))
        self._poll()

    def resume(self) -> None:
        """Continue after an administrator's pause or a failed flush; requests that failed are tried again now."""
        self.engine.let_go(Hold.PAUSE)
        self.engine.let_go(Hold.FLUSH)

    def go_on_through(self, chain: Chain) -> None:
        """Continue through another chain, which the caller has wired to the engine."""
        for _, queue in self._by_port.values():
            queue.decoder.sectors = chain.geometry.size // SECTOR
        self.engine.let_go(Hold.SWAP, chain.submit)

    def quiet(self, why: Hold) -> Step:
        """Return a step (`loop.steps`) that stops taking requests, and is done when nothing is in flight."""
        return lambda done: self.engine.hold(why, lambda: self._reactor.call_soon(partial(done, 0)))

    def close(self, *, hands_over: bool = False, goes_on: bool = False) -> None:
        """Release everything; nothing is in flight. Requests held back are answered with an error.

        They are not if somebody does them later: with `hands_over` a successor, which has the journal; with `goes_on`
        whoever joins the rings anew.

        Raises: any error met meanwhile; everything is released all the same.
        """
        self._closed = True
        self._undo.callback(self._counters.publish)
        if not hands_over:
            self._undo.callback(self._put_back if goes_on else self.engine.fail_held)  # this runs first
        try:
            self._undo.close()
        finally:
            self.engine.queues.clear()  # a cycle of references ends here, else only the garbage collector would
            self._by_port.clear()

    def _put_back(self) -> None:
        for _, queue in self._by_port.values():
            queue.put_back()

    def count_layers(self, figures: Callable[[], list[int]]) -> None:
        """Publish the figures of a chain's layers together with the counters, from now on."""
        self._counters.figures = figures
        self._counters.publish()

    def publish_counters(self) -> None:
        """Bring the counters' page up to date now; this happens once a second anyhow."""
        self._counters.publish()

    def _flush_failed(self, code: int) -> None:
        poison(self._journal, code)  # first: the kernel reports lost data only once, and we may die at any moment
        self._channel.alarm(describe_failed_flush(code))
        self._channel.stand()

    def _tell_trouble(self, sentence: str) -> None:
        self.trouble = sentence
        if sentence:
            self._channel.alarm(sentence)
        self._channel.stand()

    def _halt(self, ring: int, why: str) -> None:
        self.halted = f"ring {ring} was stopped: {why}"
        self._channel.stand()

    def _open_rings(self, undo: ExitStack, peer: Peer, table: GrantTable) -> None:
        self._events = peer.host.open_events(peer.domid)
        undo.callback(self._events.close)
        for number, parameters in enumerate(self.agreed.rings):
            self._open_ring(undo, table, number, parameters, peer.host)
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
        if not self._is_inherited:
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
        if self._is_inherited:
            self._go_on(queue, channel)

    def _go_on(self, queue: Queue, channel: EventChannel) -> None:
        try:
            records = queue.go_on()
        except RingOverflow as problem:
            queue.halt(str(problem))
            return
        if records:
            self.engine.go_on_with(records)
        channel.notify()  # the predecessor may have died before its last notification

    def _take_events(self) -> None:
        for port in self._events.pending():
            channel, queue = self._by_port[port]
            channel.has_fired = True
            self.engine.serve(queue)

    def _poll(self) -> None:
        """Look at idle rings once a second. Requests that wait there at two looks in a row were never announced."""
        if self._closed:
            return
        poll = WeakMethod(self._poll)  # so that the timer does not keep this object after its frontend has gone
        # First, so that an exception over a ring below does not end these looks.
        self._reactor.call_later(SAFETY_POLL_S, lambda: (again := poll()) and again())
        for queue in self.engine.queues:
            if queue.is_idle and not queue.halted and self._waits(queue):
                if self._suspects.get(queue) == queue.ring.consumed:
                    self._counters.missed_wakeups += 1
                    self.engine.serve(queue)
                else:
                    self._suspects[queue] = queue.ring.consumed
        self._counters.publish()

    def _waits(self, queue: Queue) -> bool:
        try:
            return queue.ring.available() > 0
        except RingOverflow:
            return True  # `serve` halts it


def describe_failed_flush(code: int) -> str:
    """Return a sentence about a flush that failed with errno `code`."""
    return f"a flush failed ({errno.errorcode.get(code, code)}); the disk is paused"
