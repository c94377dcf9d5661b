"""Takes one disk from stage to stage, in steps (`loop.steps`): open, serve, exchange the chain, leave, close.

Must not know a message's number: `main` decides in which order the steps come, and tells the supervisor of them.

    serve      end the export -> map the rings -> note in the journal what was agreed
    exchange   check -> nothing in flight -> flush -> close -> open -> note in the journal -> go on
    leave      end the export -> nothing in flight -> flush -> unmap -> take the note back

If the new chain cannot be opened, or the guest could not continue with it, the former one stays in service. A failed
flush ends the exchange before anything is closed: the disk is paused as after any failed flush.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

from xenbackend import counters, journal
from xenbackend.block.chain import Chain
from xenbackend.block.driver import Filter
from xenbackend.block.policy import Policy
from xenbackend.block.request import AWAY
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.kernel import memfd
from xenbackend.kernel.ports import open_host
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.steps import Steps
from xenbackend.protocol import codec, messages
from xenbackend.worker import io_queue
from xenbackend.worker.channel import Channel
from xenbackend.worker.connection import Below, Connection, Peer, describe_failed_flush
from xenbackend.worker.connector import Connector
from xenbackend.worker.disk import Disk, is_locked
from xenbackend.worker.export import Export
from xenbackend.worker.holds import Hold
from xenbackend.worker.leaf import make_leaf
from xenbackend.worker.opener import OpenerGone, RemoteOpener
from xenbackend.worker.polling import Permit, Poller


class NoChainLeft(Exception):
    """The chain was closed, and neither another one nor the former one could be opened."""


class Stages:
    """The disk of one worker. `layers`: as they were last seen. `connection`: not None while a frontend is served."""

    def __init__(
        self,
        order: messages.Open,
        fds: list[int],
        reactor: Reactor,
        channel: Channel,
        on_bug: Callable[[Exception], None],
        permit: Permit | None,
    ) -> None:
        """Open nothing yet. `fds` are the order's journal and memories, ours from now on.

        `on_bug` gets exceptions that layers raise; `permit` says whether to look for requests.
        """
        self.order = order
        self.layers: list[messages.LayerFacts] = []
        self.connection: Connection | None = None
        self.is_paused = order.is_paused
        self._policy = order.policy
        self._order = 0  # the operator's, by which the chain was put in
        self._export: Export | None = None
        self._had_bugs = False  # of layers, in an earlier connection or an export
        self._permit = permit
        self._devices: list[int] = []  # of the host, while this process lives
        self._no_devices: DriverError | None = None  # why there are none
        self._reactor = reactor
        self._channel = channel
        self._on_bug = on_bug
        self._journal = memfd.map_sealed(fds[0], journal.SIZE)
        os.close(fds[0])
        memories = dict(zip(order.memories, fds[1:], strict=True))
        self._stopped = ""  # why a layer's callbacks were stopped
        self.connector = Connector(reactor, channel.stand, channel.disconnected)
        self._disk = Disk(
            order, memories, reactor, channel.drop, on_bug,
            self.connector, self._layer_reported, self._layer_stopped, self._layer_gave_up,
            alarm=channel.alarm,
        )  # fmt: skip

    @property
    def chain(self) -> str:
        """Return the text of the chain that is open, or would be."""
        return self._disk.text

    @property
    def is_open(self) -> bool:
        """Return whether the chain is open, and was not only probed."""
        return self._disk.chain is not None

    @property
    def export(self) -> str:
        """Return the path of the export's socket; empty if there is no export."""
        return self._export.path if self._export else ""

    @property
    def trouble(self) -> str:
        """Return a sentence if the disk could not do a request, and tries again or waits; else an empty text."""
        return self._stopped or (self.connection.trouble if self.connection else "")

    @property
    def flush_failed(self) -> str:
        """Return a sentence if a flush failed, of this worker or an earlier one; else an empty text."""
        code = journal.poisoned(self._journal)
        return describe_failed_flush(code) if code else ""

    def open(self, opener: RemoteOpener) -> None:
        """Open the chain; if somebody else has its lock, and it may wait, only probe it. Raises: XenbackendError."""
        try:
            self._devices = opener.open_devices()
        except OpenerGone:
            raise
        except (DriverError, OSError) as problem:  # a disk that cannot be served to a guest may still be exported
            self._no_devices = DriverError(str(problem), errno=problem.errno or errno.EIO)
        try:
            self.open_chain(opener)
        except XenbackendError as problem:
            if not (self.order.may_wait and is_locked(problem)):
                raise
            with self._disk.opening_by(opener):
                self.layers = self._disk.probe()

    def open_chain(self, opener: RemoteOpener) -> None:
        """Open the chain, and export the disk to a device model if that was ordered. Raises: XenbackendError."""
        with self._disk.opening_by(opener):
            chain = self._disk.open()
        self.layers = self._disk.layers
        if (spare := io_queue.take_spare()) is not None:
            # The end of a process with a context takes 35 ms, for which its successor waits, and so does this call.
            self._reactor.run_in_thread(spare.close, lambda: None)
        if self.order.export:
            self._begin_export(opener, self.order.export, chain)

    def serve(self, connect: messages.Connect | None) -> Steps[None]:
        """Serve a frontend's rings; None: those that a predecessor served. Raises: XenbackendError."""
        if self.connection is not None:
            raise DriverError("a frontend is served already", errno=errno.EBUSY)
        yield from self._end_export()
        chain = self.opened()
        if self._no_devices is not None:
            raise self._no_devices
        agreed = connect or self._recall()
        if connect is not None:
            self._note(None)
        host = open_host(self.order.host, self._devices)
        connection = Connection(
            Peer(host, self.order.frontend_domid, agreed, is_inherited=connect is None),
            Below(chain.geometry, chain.submit, self._disk.files.kick),
            self._reactor,
            self._journal,
            self._channel,
            Poller(self.order.poll_us * 1000, self._permit),
            Policy(self._policy),
        )
        if self._had_bugs:
            connection.engine.expect_strays()
        if self.is_paused or self._stopped:
            connection.engine.hold(Hold.PAUSE)
        try:
            self._wire(chain, connection)
        except BaseException:
            connection.close(hands_over=True)
            raise
        self.connection = connection

    def check(self, question: messages.Swap, opener: RemoteOpener) -> list[str]:
        """Return the layers of another chain. Raises: XenbackendError, if it cannot take the place of this one."""
        self.opened()
        with self._disk.opening_by(opener):
            return self._disk.check_successor(question.chain, replaces=question.replaces)

    def exchange(self, text: str, opener: RemoteOpener, order: int) -> Steps[None]:
        """Serve through another chain, which was checked; `order` is the number of the operator's order.

        Raises: XenbackendError, if the former chain stays in service; NoChainLeft.
        """
        connection = self.connection
        if connection is not None:
            yield connection.quiet(Hold.SWAP)
        code = yield from self._flush()
        if code:
            if connection is not None and code != AWAY:  # then the former chain does the guest's next flush
                connection.engine.flush_failed(code)
            self._go_on(connection)
            raise DriverError(_describe(code), errno=code)
        if connection is not None:
            connection.count_layers(list)  # the loop may run while layers close, and a closed one has no figures
        try:
            with self._disk.opening_by(opener):
                self._disk.exchange(text)
            self._order = order
        except XenbackendError:
            raise
        except Exception as problem:  # the former chain could not be opened again, or a layer's bug (D8)
            raise NoChainLeft(str(problem)) from problem
        finally:
            self._go_on(connection)

    def branch(self, file: str, image_format: str, opener: RemoteOpener) -> str:
        """Make an image over the one that is written to, and return the chain with it. Raises: ConfigError, OSError."""
        with self._disk.opening_by(opener):
            return make_leaf(self.opened(), opener, file, image_format)

    def keep(self, name: str) -> Steps[None]:
        """Have the source make a snapshot `name` by its own means, while the guest goes on. Raises: DriverError."""
        layers = self.opened().layers
        if any(isinstance(layer.driver, Filter) and layer.driver.keeps_writes for layer in layers):
            problem = "what the guest writes goes to a layer above the image, so a snapshot of the image would miss it"
            raise DriverError(problem, errno=errno.EOPNOTSUPP)
        if any(isinstance(layer.driver, Filter) and layer.driver.may_answer_alone for layer in layers):
            problem = (
                "a cache with mode=writeback may hold data that the image does not have, and that a snapshot would miss"
            )
            raise DriverError(problem, errno=errno.EOPNOTSUPP)
        source = next(layer.driver for layer in layers if not layer.driver.is_filter)
        problems: list[DriverError] = []

        def call() -> None:
            try:
                source.snapshot(name)
            except DriverError as problem:
                problems.append(problem)

        yield lambda done: self._reactor.run_in_thread(call, partial(done, 0))
        if problems:
            raise problems[0]

    def pause(self, then: Callable[[], None]) -> None:
        """Take nothing from the rings; call `then` when nothing is in flight, also if the frontend leaves meanwhile."""
        self.is_paused = True
        if self.connection is None:
            then()
        else:
            self.connection.engine.hold(Hold.PAUSE, then)

    def resume(self) -> None:
        """Continue after a pause or a failed flush; requests that failed are tried again now."""
        self.is_paused = False
        self._stopped = ""
        self._disk.resume()
        journal.poison(self._journal, 0)
        if self.connection is not None:
            self.connection.resume()

    def rewired(self, chain: Chain) -> None:
        """Submit requests to the top that a chain has now, if it still is the chain in service."""
        if self.connection is not None and chain is self._disk.chain:
            self.connection.engine.go_through(chain.submit)

    def set_policy(self, policy: str) -> None:
        """Use another policy for requests that fail. Raises: ConfigError."""
        parsed = Policy(policy)
        self._policy = policy
        if self.connection is not None:
            self.connection.engine.retries.policy = parsed

    def control(self, command: messages.Command) -> bytes:
        """Do a layer's verb for an operator; return its answer. Raises: DriverError; whatever a layer's bug raises."""
        return self.opened().control(command.layer, command.verb, command.arguments)

    def leave(self, *, hands_over: bool = False, goes_on: bool = False, ends: bool = False) -> Steps[None]:
        """Wait until nothing is in flight, flush, unmap the rings.

        hands_over: requests held back, and the note of what was agreed, are left to a successor.
        goes_on: requests held back are put back into the ring.
        ends: the worker ends; if its last flush fails, a guest that continues with a successor has lost data.
        """
        yield from self._end_export()
        connection = self.connection
        if connection is None:
            return
        yield connection.quiet(Hold.HAND_OVER if hands_over else Hold.END)
        code = yield from self._flush()
        if code == AWAY and (hands_over or goes_on):
            pass  # the server has all answered writes, and a later worker does the guest's next flush
        elif code and ends:
            connection.engine.flush_failed(code)
        elif code:
            self._channel.alarm(_describe(code))
        self._had_bugs |= connection.engine.bugs > 0
        self.connection = None
        try:
            connection.close(hands_over=hands_over, goes_on=goes_on)
        except Exception as bug:  # whatever goes wrong now, chain and image must still be closed
            self._on_bug(bug)
        if not hands_over:
            self._note(None)

    def close(self) -> None:
        """Close the chain and release everything. Raises: what the first layer that failed raised."""
        self.layers = []
        try:
            self._disk.close()
        finally:
            while self._devices:
                os.close(self._devices.pop())

    def publish_counters(self) -> None:
        """Bring the counters' page up to date now; this happens once a second anyhow."""
        if self.connection is not None:
            self.connection.publish_counters()

    def count_bug(self, bug: Exception) -> str:
        """Count a bug, and return the text of the layer that raised it; empty if none did."""
        if self.connection is not None:
            self.connection.engine.bugs += 1  # which is published
        else:
            words, place = self._journal[: counters.SIZE].cast("Q"), counters.INDEX["bugs"]
            words[place] = (words[place] + 1) & counters.WORD_MAX
        return self._disk.chain.blame(bug) if self._disk.chain else ""

    def _layer_reported(self) -> None:
        """Report a fact that a layer in service has published; those of an opening are reported anyhow."""
        if self._disk.chain is not None and self.layers:
            self.layers = self._disk.layers
            self._channel.stand()

    def _layer_stopped(self, sentence: str) -> None:
        """Pause the disk, as the callbacks of a layer were stopped."""
        self._stopped = sentence
        if self.connection is not None:
            self.connection.engine.hold(Hold.PAUSE)
        self._channel.alarm(sentence)
        self._channel.stand()

    def _layer_gave_up(self, sentence: str) -> None:
        """End this process, as a layer needs a new one."""
        self._channel.alarm(sentence)
        os._exit(1)

    def opened(self) -> Chain:
        """Return the chain. Raises: DriverError, if none is open."""
        if self._disk.chain is None:
            raise DriverError("the chain is not open", errno=errno.ENODEV)
        return self._disk.chain

    def _go_on(self, connection: Connection | None) -> None:
        """Serve through the chain that is open now, if one is."""
        if self._disk.chain is None:
            return
        self.layers = self._disk.layers
        if connection is not None:
            self._wire(self._disk.chain, connection)  # first: the journal must name it before a request goes there
            connection.go_on_through(self._disk.chain)
        else:
            self._note(self._left())  # a frontend that a predecessor served may still have to be served

    def _wire(self, chain: Chain, connection: Connection) -> None:
        """Connect a chain with a connection, and note for a successor what is served, and how."""
        chain.contain = connection.engine.contain
        connection.engine.release = chain.release
        connection.count_layers(chain.figures)
        chain.complete = connection.engine.finish
        self._note(connection.agreed)

    def _note(self, connect: messages.Connect | None) -> None:
        """Note in the journal, for a successor, the chain and what was agreed with the frontend."""
        journal.AGREED.write(self._journal, codec.as_fields(messages.Agreed(self._disk.text, connect, self._order)))

    def _recall(self) -> messages.Connect:
        """Return what a predecessor had agreed with the frontend. Raises: DriverError, if there is no such note."""
        connect = self._left()
        if connect is None:
            raise DriverError("the journal has no record of what was agreed with the frontend", errno=errno.ENODATA)
        return connect

    def _left(self) -> messages.Connect | None:
        """Return what a predecessor had agreed with a frontend that has not left since; None if there is none."""
        try:
            found: messages.Agreed = codec.restore(messages.Agreed, journal.AGREED.read(self._journal))
        except codec.NotAMessage:  # a predecessor may have left anything there
            return None
        return found.connect

    def _begin_export(self, opener: RemoteOpener, path: str, chain: Chain) -> None:
        """Export the disk to a device model; if that fails, the guest can still use it by its own driver."""
        try:
            listener = opener.listen()
        except (DriverError, OSError) as error:
            problem = getattr(error, "strerror", "") or error
            self._channel.alarm(f"{path}: device models cannot boot from this disk: {problem}")
        else:
            kick = self._disk.files.kick
            self._export = Export(listener, path, chain, self._reactor, kick, self._channel, self._on_bug)

    def _end_export(self) -> Steps[None]:
        """End the export, so that the chain is free for a connection (D10)."""
        export = self._export
        if export is not None:
            yield lambda done: export.close(partial(done, 0))
            # The device model's own last flush would find no server any more, so we do it.
            code = yield from self._flush()
            if code:
                self._channel.alarm(_describe(code))
            self._had_bugs |= export.had_bugs
            self._export = None

    def _flush(self) -> Steps[int]:
        """Make every answered write durable; return 0 or an errno."""
        try:
            yield self._disk.flush
        except OSError as error:
            return error.errno or errno.EIO
        return 0


def _describe(code: int) -> str:
    """Return a sentence about a last flush that failed: nobody waits for its answer."""
    return f"the last flush failed: {'the server of the disk is away' if code == AWAY else os.strerror(code)}"
