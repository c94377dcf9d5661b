"""The process that serves one vbd: its start, the messages from the supervisor, its end.

Must not open xenstore, log anywhere but through the supervisor, or outlive it: when the socket closes, the chain is
closed in order and the process ends. A supervisor that is only started again leaves the socket open meanwhile
(`supervisor.keeper`), and asks the worker where it stands.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
import sys
from collections.abc import Callable

from xenbackend import counters, journal
from xenbackend.block.policy import Policy
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.kernel.ports import open_host
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import messages
from xenbackend.worker.boot import Boot
from xenbackend.worker.channel import Channel
from xenbackend.worker.connection import Connection
from xenbackend.worker.disk import Disk, describe_flush, is_locked
from xenbackend.worker.exchange import Exchange
from xenbackend.worker.holds import Hold
from xenbackend.worker.polling import POLL_US, Poller, find_permit

MAX_DESCRIPTORS = 1 + messages.MAX_MEMORIES  # beside one message: the journal, and memories
_REPLY_MAX = 128 * 1024  # bytes of a datagram: below any socket's buffer, and `messages.MAX_MESSAGE`
_SENTENCE_MAX = 1000  # characters
LOCK_PAUSE_S = 0.02  # between two tries for the lock of a domain that migrates


class Worker:
    """Answers the supervisor's messages, one after the other, from the loop."""

    def __init__(self, channel: socket.socket) -> None:
        """Serve the supervisor at the other end of `channel`, a SOCK_SEQPACKET socket."""
        self._channel = channel
        self._speech = Channel(channel)
        self._reactor = Reactor(on_bug=self._on_bug)
        self._permit = find_permit()
        self._open: messages.Open
        self._disk: Disk | None = None
        self._exchange: Exchange
        self._layers: list[messages.LayerFacts] = []  # as last said
        self._policy = ""
        self._is_paused = False  # by an administrator
        self._lost = ""  # a flush failed earlier
        self._is_alone = False  # the supervisor is gone
        self._journal = memoryview(b"")
        self._waiting: messages.Connect | messages.Rejoin | None = None  # for the image's lock, or the export's end
        self._boot = Boot(self._reactor, self._speech, self._flush, self._on_bug)  # until the first connection
        self._connection: Connection | None = None
        self._is_closing = False
        self._hands_over = False  # what is agreed with the frontend, to a successor
        self._had_bugs = False  # of layers, in an earlier connection
        self._when_disconnected: list[Callable[[], None]] = []
        self._steps: dict[type[object], Callable[..., None]] = {
            messages.Connect: self._on_connect,
            messages.Rejoin: self._on_connect,
            messages.Swap: self._on_swap,
            messages.Branch: self._on_branch,
            messages.Pause: self._on_pause,
            messages.Resume: self._on_resume,
            messages.Obey: self._on_obey,
            messages.Report: self._on_report,
            messages.Command: self._on_command,
            messages.Disconnect: self._on_disconnect,
            messages.Close: self._on_close,
        }

    def run(self) -> None:
        """Serve until `Close`, or until the supervisor is gone."""
        self._reactor.add(self._channel.fileno(), self._take_message)
        # The data path makes no reference cycles; what start-up made need not be looked at again and again.
        gc.collect()
        gc.freeze()
        self._reactor.run()

    def _take_message(self) -> None:
        datagram, fds, _, _ = socket.recv_fds(self._channel, messages.MAX_MESSAGE, MAX_DESCRIPTORS)
        if not datagram:  # the supervisor is gone
            self._is_alone = True
            self._reactor.remove(self._channel.fileno())
            self._on_close(messages.Close())
            return
        message = messages.decode(datagram)
        if isinstance(message, messages.Open):
            self._on_open(message, fds)
        else:
            self._steps[type(message)](message)

    def _on_open(self, message: messages.Open, fds: list[int]) -> None:
        self._open = message
        self._policy, self._is_paused, self._lost = message.policy, message.is_paused, message.lost
        self._journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
        os.close(fds[0])
        memories = dict(zip(message.memories, fds[1:], strict=True))
        self._disk = Disk(message, memories, self._reactor, self._speech.keep, self._speech.drop, self._on_bug)
        self._exchange = Exchange(self._disk, self._listen, self._go_on_through_chain, self._give_up)
        try:
            self._open_chain(self._disk)
        except XenbackendError as problem:
            if message.may_wait and is_locked(problem):
                self._peek(self._disk)
            else:
                self._fail(problem)

    def _open_chain(self, disk: Disk) -> None:
        chain = disk.open()
        if self._open.export:
            self._boot.begin(self._open.export, chain, disk.files)
        self._layers = disk.layers
        self._speech.say(messages.Opened(self._layers, self._boot.path))

    def _peek(self, disk: Disk) -> None:
        try:
            self._layers = disk.peek()
        except XenbackendError as problem:
            self._fail(problem)
            return
        self._speech.say(messages.Opened(self._layers))

    def _fail(self, problem: XenbackendError) -> None:
        self._speech.say(messages.Failed(str(problem), getattr(problem, "errno", errno.EINVAL)))

    def _on_connect(self, message: messages.Connect | messages.Rejoin) -> None:
        self._waiting = message
        if self._disk is None or self._disk.chain is None:
            self._wait_for_image(message)
        else:
            self._boot.end(lambda: self._connect(message))

    def _wait_for_image(self, message: messages.Connect | messages.Rejoin) -> None:
        """Open what was only looked at as soon as its lock is free, then connect; unless we are told otherwise."""
        assert self._disk is not None  # noqa: S101 - the order of messages
        if self._waiting is not message:
            return
        try:
            if self._disk.chain is None:
                self._open_chain(self._disk)
        except XenbackendError as problem:
            if is_locked(problem):
                self._reactor.call_later(LOCK_PAUSE_S, lambda: self._wait_for_image(message))
            else:
                self._waiting = None
                self._fail(problem)
            return
        self._on_connect(message)

    def _connect(self, message: messages.Connect | messages.Rejoin) -> None:
        disk, self._waiting = self._disk, None
        assert disk is not None and disk.chain is not None  # noqa: S101, PT018 - the order of messages
        rejoins = isinstance(message, messages.Rejoin)
        try:
            agreed = self._recall() if isinstance(message, messages.Rejoin) else message
            if not rejoins:
                journal.AGREED.write(self._journal, None)
            self._connection = Connection(
                host=open_host(self._open.host),
                reactor=self._reactor,
                domid=self._open.frontend_domid,
                agreed=agreed,
                rejoins=rejoins,
                geometry=disk.chain.geometry,
                journal=self._journal,
                submit=disk.chain.submit,
                kick=disk.files.kick,
                poller=Poller(int(self._open.settings.get("poll_us", POLL_US)) * 1000, self._permit),
                policy=Policy(self._policy),
                voice=self._speech,
            )
        except XenbackendError as problem:
            self._speech.say(messages.Failed(str(problem), getattr(problem, "errno", errno.EIO)))
            return
        if self._had_bugs or self._boot.had_bugs:
            self._connection.engine.expect_strays()
        if not (rejoins or agreed.goes_on):
            self._lost = ""  # whoever begins anew goes by what he finds
        if self._lost and not self._connection.paused:
            self._connection.hold_lost(self._lost)
        if self._is_paused:
            self._hold(self._connection)
        self._wire(disk, self._connection)
        self._note(disk.text, agreed)
        self._speech.say(messages.Connected())

    def _wire(self, disk: Disk, connection: Connection) -> None:
        assert disk.chain is not None  # noqa: S101 - the callers have opened it
        disk.chain.contain = connection.engine.contain
        disk.chain.complete = connection.engine.finish

    def _note(self, chain: str, agreed: messages.Connect) -> None:
        """Leave to a successor what is served, and how."""
        journal.AGREED.write(self._journal, {"chain": chain, "connect": messages.as_fields(agreed)})

    def _recall(self) -> messages.Connect:
        """Return what a predecessor had agreed with the frontend. Raises: DriverError where nobody did."""
        noted = journal.AGREED.read(self._journal)
        if noted is None:
            raise DriverError("the journal does not know what was agreed with the frontend", errno=errno.ENODATA)
        agreed: messages.Connect = messages.restore(messages.Connect, noted["connect"])
        return agreed

    def _on_swap(self, message: messages.Swap) -> None:
        def done(problem: str) -> None:
            self._speech.say(messages.Unswapped(problem) if problem else messages.Swapped(message.chain, self._layers))

        if self._may_exchange():
            self._exchange.swap(message.chain, self._connection, done)

    def _on_branch(self, message: messages.Branch) -> None:
        if not self._may_exchange():
            return
        from xenbackend.worker.leaf import make_leaf  # late: most workers never need it

        assert self._disk is not None and self._disk.chain is not None  # noqa: S101, PT018 - `_may_exchange` has looked
        try:
            self._speech.say(messages.Branched(make_leaf(self._disk.chain, message.file, message.format)))
        except (XenbackendError, OSError) as problem:
            self._speech.say(messages.Unswapped(str(problem)))

    def _may_exchange(self) -> bool:
        """Return whether the chain may be exchanged now, and say so if it may not."""
        may = bool(self._disk and self._disk.chain) and not (self._boot.path or self._when_disconnected)
        if not may:
            self._speech.say(messages.Unswapped("the disk is not in service by the guest's own driver"))
        return may

    def _listen(self, is_listening: bool) -> None:  # noqa: FBT001 - a switch
        """Hear the supervisor, or let what it says wait; nothing where it has gone."""
        if self._is_alone:
            return
        if is_listening:
            self._reactor.add(self._channel.fileno(), self._take_message)
        else:
            self._reactor.remove(self._channel.fileno())

    def _go_on_through_chain(self) -> None:
        """Serve through the chain that is open now, and say so to a successor before the first request goes there."""
        disk, connection = self._disk, self._connection
        assert disk is not None and disk.chain is not None  # noqa: S101, PT018 - just opened
        self._layers = disk.layers
        if connection is not None:
            self._note(disk.text, connection.agreed)
            self._wire(disk, connection)
            connection.go_on_through(disk.chain)

    def _give_up(self, sentence: str) -> None:
        """End the process, so that a successor tries again: no chain could be opened."""
        self._speech.alarm(sentence)
        self._speech.say(messages.Unswapped(sentence))
        os._exit(1)

    def _on_pause(self, _: messages.Pause) -> None:
        self._is_paused = True
        if self._connection is None:
            self._speech.say(messages.Held())
        else:
            self._hold(self._connection)

    def _hold(self, connection: Connection) -> None:
        connection.engine.hold(Hold.PAUSE, lambda: self._speech.say(messages.Held()))

    def _on_resume(self, _: messages.Resume) -> None:
        self._is_paused, self._lost = False, ""
        if self._connection is not None:
            self._connection.resume()

    def _on_obey(self, message: messages.Obey) -> None:
        self._policy = message.policy
        if self._connection is not None:
            self._connection.engine.retries.policy = Policy(message.policy)

    def _on_report(self, message: messages.Report) -> None:
        disk, connection = self._disk, self._connection
        if connection is not None:
            connection.publish_counters()  # whoever asks may look at them next
        self._speech.say(
            messages.Standing(
                phase=self._phase(),
                chain=disk.text if disk else "",
                read_only=disk is not None and self._open.read_only,
                shareable=disk is not None and self._open.shareable,
                layers=self._layers,
                export=self._boot.path,
                halted=connection.halted if connection else "",
                paused=connection.paused if connection else "",
                trouble=connection.trouble if connection else "",
                report=message.id,
            )
        )

    def _phase(self) -> str:
        if self._when_disconnected:
            return "disconnecting"
        if self._connection is not None:
            return "serving"
        if self._waiting is not None:
            return "connecting"
        return "open" if self._layers else "idle"

    def _on_command(self, message: messages.Command) -> None:
        try:
            if self._disk is None or self._disk.chain is None:
                raise DriverError("the chain is not open", errno=errno.ENODEV)
            data = self._disk.chain.control(message.layer, message.verb, message.arguments)
            reply = messages.Reply(message.id, ok=True, data=data.decode("latin-1"))
            if len(messages.encode(reply)) > _REPLY_MAX:
                raise DriverError(f"an answer of {len(data)} bytes is too large; ask for less", errno=errno.EMSGSIZE)
        except XenbackendError as problem:
            reply = messages.Reply(message.id, ok=False, data=str(problem)[:_SENTENCE_MAX])
        except Exception as bug:  # D8; whoever asked is still waiting
            self._on_bug(bug)
            sentence = f"a bug in layer {message.layer}: {type(bug).__name__}: {bug}"
            reply = messages.Reply(message.id, ok=False, data=sentence[:_SENTENCE_MAX])
        self._speech.say(reply)

    def _on_disconnect(self, _: messages.Disconnect) -> None:
        self._boot.end(lambda: self._disconnect(lambda: self._speech.say(messages.Disconnected())))

    def _on_close(self, message: messages.Close) -> None:
        self._is_closing, self._hands_over = True, message.hands_over
        self._boot.end(lambda: self._disconnect(self._close))

    def _disconnect(self, then: Callable[[], None]) -> None:
        self._waiting = None
        if self._connection is None:
            then()
            return
        self._when_disconnected.append(then)
        if len(self._when_disconnected) == 1:  # else it is on its way already
            self._connection.disconnect(self._flush, self._disconnected, hands_over=self._hands_over)

    def _disconnected(self) -> None:
        assert self._connection is not None  # noqa: S101 - it was asked to end
        self._had_bugs |= self._connection.engine.bugs > 0
        self._connection = None
        if not self._hands_over:
            journal.AGREED.write(self._journal, None)
        calls, self._when_disconnected = self._when_disconnected, []
        for call in calls:
            call()

    def _flush(self, then: Callable[[], None]) -> None:
        """Make everything durable that was acknowledged, then go on; a failure is said, for it cannot be answered."""

        def flushed(code: int) -> None:
            if code and self._connection is not None and self._is_closing:
                self._connection.engine.flush_failed(code)  # the guest may go on with a successor
            elif code:
                self._speech.alarm(describe_flush(code))
            then()

        assert self._disk is not None  # noqa: S101 - there was a connection or an export
        self._disk.flush(flushed)

    def _close(self) -> None:
        try:
            if self._disk is not None:
                self._disk.close()
        finally:  # whatever a layer does, the process ends
            self._speech.say(messages.Closed())
            self._reactor.stop()

    def _on_bug(self, bug: Exception) -> None:
        if self._connection is not None:
            self._connection.engine.bugs += 1  # the tally publishes it
        elif len(self._journal):
            self._journal[: counters.SIZE].cast("Q")[counters.INDEX["bugs"]] += 1
        import traceback  # late: most workers never need it

        chain = self._disk.chain if self._disk else None
        where = chain.blame(bug) if chain else ""
        self._speech.alarm(f"a bug{f' in {where}' if where else ''}: {''.join(traceback.format_exception(bug))}")


def serve(channel: socket.socket) -> int:
    """Serve the vbd whose supervisor is at the other end of `channel`, and return the exit status."""
    try:
        Worker(channel).run()
    except (BrokenPipeError, ConnectionResetError):  # the supervisor went away while we spoke
        return 1
    return 0


def main(arguments: list[str]) -> int:
    """Serve over the socket given by number."""
    if len(arguments) != 2 or arguments[0] != "--socket" or not arguments[1].isdecimal():
        print("a worker is started by the service, with --socket and the number of a descriptor", file=sys.stderr)
        return 2
    return serve(socket.socket(fileno=int(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
