"""The process that serves one vbd: its start, the messages from the supervisor, its end.

Must not open xenstore, log anywhere but through the supervisor, or outlive it: when the socket closes, the chain is
closed in order and the process ends.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from xenbackend import control, counters, journal
from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.block.driver import Env
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.kernel.ports import open_host
from xenbackend.worker.connection import Connection
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.facts import facts_of
from xenbackend.worker.files import HostFiles
from xenbackend.worker.peek import peek
from xenbackend.worker.polling import POLL_US, Poller
from xenbackend.worker.reactor import Reactor
from xenbackend.worker.speech import Speech

if TYPE_CHECKING:
    from xenbackend.worker.export import Export

MAX_DESCRIPTORS = 1 + control.MAX_MEMORIES  # beside one message: the journal, and memories
_REPLY_MAX = 128 * 1024  # bytes of a datagram: below any socket's buffer, and `control.MAX_MESSAGE`
_SENTENCE_MAX = 1000  # characters
LOCK_TIMEOUT_S = 5.0  # a predecessor's last writes hold the image's lock until they have landed
LOCK_PAUSE_S = 0.02  # between two tries for the lock of a domain that migrates


class Worker:
    """Answers the supervisor's messages, one after the other, from the loop."""

    def __init__(self, channel: socket.socket) -> None:
        """Serve the supervisor at the other end of `channel`, a SOCK_SEQPACKET socket."""
        self._channel = channel
        self._speech = Speech(channel)
        self._reactor = Reactor(on_bug=self._on_bug)
        self._files = HostFiles(self._reactor, lock_timeout_s=LOCK_TIMEOUT_S)
        self._open: control.Open | None = None
        self._chain: Chain | None = None
        self._env: EnvFactory | None = None
        self._journal = memoryview(b"")
        self._waiting: control.Connect | None = None  # for the image's lock
        self._export: Export | None = None  # until the first connection
        self._connection: Connection | None = None
        self._had_bugs = False  # of layers, in an earlier connection or in the export
        self._when_unexported: list[Callable[[], None]] = []
        self._when_disconnected: list[Callable[[], None]] = []
        self._steps: dict[type[object], Callable[..., None]] = {
            control.Open: self._on_open,
            control.Connect: self._on_connect,
            control.Command: self._on_command,
            control.Disconnect: self._on_disconnect,
            control.Close: self._on_close,
        }

    def run(self) -> None:
        """Serve until `Close`, or until the supervisor is gone."""
        self._reactor.add(self._channel.fileno(), self._take_message)
        # The data path makes no reference cycles; what start-up made need not be looked at again and again.
        gc.collect()
        gc.freeze()
        self._reactor.run()

    def _take_message(self) -> None:
        datagram, fds, _, _ = socket.recv_fds(self._channel, control.MAX_MESSAGE, MAX_DESCRIPTORS)
        if not datagram:  # the supervisor is gone
            self._reactor.remove(self._channel.fileno())
            self._on_close(control.Close())
            return
        message = control.decode(datagram)
        if isinstance(message, control.Open):
            self._on_open(message, fds)
        else:
            self._steps[type(message)](message)

    def _on_open(self, message: control.Open, fds: list[int]) -> None:
        self._open = message
        self._journal = memoryview(mmap.mmap(fds[0], journal.SIZE))
        os.close(fds[0])
        self._env = EnvFactory(
            self._reactor,
            self._files,
            dict(zip(message.memories, fds[1:], strict=True)),
            self._speech.keep,
            resumes=message.resumes,
        )
        if message.may_wait:
            self._files.lock_timeout_s = 0.0
        try:
            self._open_chain(message)
        except XenbackendError as problem:
            if message.may_wait and _is_locked(problem):
                self._peek(message)
            else:
                self._fail(problem)

    def _open_chain(self, message: control.Open) -> None:
        self._chain = open_chain(
            parse_chain(message.chain), self._make_env, read_only=message.read_only, shareable=message.shareable
        )
        export = message.export if message.export and self._begin_export(message.export, self._chain) else ""
        self._speech.say(control.Opened([facts_of(layer) for layer in self._chain.layers], export))

    def _peek(self, message: control.Open) -> None:
        try:
            layers = peek(message.chain, self._reactor, read_only=message.read_only)
        except XenbackendError as problem:
            self._fail(problem)
            return
        self._speech.say(control.Opened(layers))

    def _fail(self, problem: XenbackendError) -> None:
        self._speech.say(control.Failed(str(problem), getattr(problem, "errno", errno.EINVAL)))

    def _make_env(self, layer: str, /, *, read_only: bool, shareable: bool) -> Env:
        assert self._env is not None  # noqa: S101 - made before the chain is opened
        return self._env(layer, read_only=read_only, shareable=shareable)

    def _begin_export(self, path: str, chain: Chain) -> bool:
        """Offer the disk to a device model; without it the guest can still use the disk by its own driver."""
        from xenbackend.worker.export import Export  # late: most workers never need it

        try:
            self._export = Export(
                path,
                chain,
                self._reactor,
                kick=self._files.kick,
                complain=self._speech.complain,
                alarm=self._speech.alarm,
                on_bug=self._on_bug,
            )
        except OSError as error:
            self._speech.alarm(f"{path}: no device model can boot from this disk: {error.strerror or error}")
        return self._export is not None

    def _end_export(self, then: Callable[[], None]) -> None:
        """Call `then` once nobody but us is above the chain (D10); messages keep their order."""
        if self._export is None:
            then()
            return
        self._when_unexported.append(then)
        if len(self._when_unexported) == 1:  # else it is on its way already
            # The device model's own last flush finds nobody any more, so it is ours to do.
            self._export.close(lambda: self._flush(self._unexported))

    def _unexported(self) -> None:
        assert self._export is not None  # noqa: S101 - it was asked to end
        self._had_bugs |= self._export.had_bugs
        self._export = None
        calls, self._when_unexported = self._when_unexported, []
        for call in calls:
            call()

    def _on_connect(self, message: control.Connect) -> None:
        if self._chain is None:
            self._waiting = message
            self._wait_for_image(message)
        else:
            self._end_export(lambda: self._connect(message))

    def _wait_for_image(self, message: control.Connect) -> None:
        """Open what was only looked at as soon as its lock is free, then connect; unless we are told otherwise."""
        assert self._open is not None  # noqa: S101 - the order of messages
        if self._waiting is not message:
            return
        try:
            self._open_chain(self._open)
        except XenbackendError as problem:
            if _is_locked(problem):
                self._reactor.call_later(LOCK_PAUSE_S, lambda: self._wait_for_image(message))
            else:
                self._waiting = None
                self._fail(problem)
            return
        self._waiting = None
        self._on_connect(message)

    def _connect(self, message: control.Connect) -> None:
        assert self._open is not None and self._chain is not None  # noqa: S101, PT018 - the order of messages
        journal.write_header(self._journal, {"vbd": self._open.vbd, **control.as_fields(message)})
        try:
            self._connection = Connection(
                host=open_host(self._open.host),
                reactor=self._reactor,
                domid=self._open.frontend_domid,
                agreed=message,
                geometry=self._chain.geometry,
                journal=self._journal,
                submit=self._chain.submit,
                kick=self._files.kick,
                poller=Poller(int(self._open.settings.get("poll_us", POLL_US)) * 1000),
                complain=self._speech.complain,
                alarm=self._speech.alarm,
                on_halt=self._on_halt,
                on_pause=lambda sentence: self._speech.say(control.Paused(sentence)),
            )
        except XenbackendError as problem:
            self._speech.say(control.Failed(str(problem), getattr(problem, "errno", errno.EIO)))
            return
        if self._had_bugs:
            self._connection.engine.expect_strays()
        self._chain.contain = self._connection.engine.contain
        self._chain.complete = self._connection.engine.finish
        self._speech.say(control.Connected())

    def _on_halt(self, ring: int, why: str) -> None:
        self._speech.say(control.Halted(ring, why))

    def _on_command(self, message: control.Command) -> None:
        try:
            if self._chain is None:
                raise DriverError("the chain is not open", errno=errno.ENODEV)
            data = self._chain.control(message.layer, message.verb, message.arguments)
            reply = control.Reply(message.id, ok=True, data=data.decode("latin-1"))
            if len(control.encode(reply)) > _REPLY_MAX:
                raise DriverError(f"an answer of {len(data)} bytes is too large; ask for less", errno=errno.EMSGSIZE)
        except XenbackendError as problem:
            reply = control.Reply(message.id, ok=False, data=str(problem)[:_SENTENCE_MAX])
        except Exception as bug:  # D8; whoever asked is still waiting
            self._on_bug(bug)
            sentence = f"a bug in layer {message.layer}: {type(bug).__name__}: {bug}"
            reply = control.Reply(message.id, ok=False, data=sentence[:_SENTENCE_MAX])
        self._speech.say(reply)

    def _on_disconnect(self, _: control.Disconnect) -> None:
        self._end_export(lambda: self._disconnect(lambda: self._speech.say(control.Disconnected())))

    def _on_close(self, _: control.Close) -> None:
        self._end_export(lambda: self._disconnect(self._close))

    def _disconnect(self, then: Callable[[], None]) -> None:
        self._waiting = None
        if self._connection is None:
            then()
            return
        self._when_disconnected.append(then)
        if len(self._when_disconnected) == 1:  # else it is on its way already
            self._connection.disconnect(self._flush, self._disconnected)

    def _disconnected(self) -> None:
        assert self._connection is not None  # noqa: S101 - it was asked to end
        self._had_bugs |= self._connection.engine.bugs > 0
        self._connection = None
        calls, self._when_disconnected = self._when_disconnected, []
        for call in calls:
            call()

    def _flush(self, then: Callable[[], None]) -> None:
        """Make everything durable that was acknowledged, then go on; a failure is said, for it cannot be answered."""
        assert self._chain is not None  # noqa: S101 - there was a connection or an export
        if self._chain.geometry.read_only or not self._chain.geometry.can_flush:
            then()
            return

        waiting = [then]

        def flushed(batch: list[Request]) -> None:
            if request not in batch or not waiting:  # what a bug had ended comes back late (D8)
                return
            if request.status not in {0, errno.EOPNOTSUPP}:
                self._speech.alarm(f"the last flush failed: {os.strerror(request.status)}")
            self._reactor.call_soon(waiting.pop())

        def contain(bug: Exception, _given: object = ()) -> None:  # D8; a bug of one layer must not keep the disk
            self._on_bug(bug)
            if waiting:
                self._reactor.call_soon(waiting.pop())

        request = Request()
        request.op, request.status = Op.FLUSH, PENDING
        self._chain.contain = contain
        self._chain.complete = flushed
        try:
            self._chain.submit([request])
            self._files.kick()
        except Exception as bug:
            contain(bug)

    def _close(self) -> None:
        try:
            if self._chain is not None:
                self._chain.close()
            if self._env is not None:
                self._env.close()
            self._files.close()
        finally:  # whatever a layer does, the process ends
            self._speech.say(control.Closed())
            self._reactor.stop()

    def _on_bug(self, bug: Exception) -> None:
        if self._connection is not None:
            self._connection.engine.bugs += 1  # the tally publishes it
        elif len(self._journal):
            words = self._journal[: counters.SIZE].cast("Q")
            words[counters.INDEX["bugs"]] += 1
        import traceback  # late: most workers never need it

        where = self._chain.blame(bug) if self._chain else ""
        self._speech.alarm(f"a bug{f' in {where}' if where else ''}: {''.join(traceback.format_exception(bug))}")


def _is_locked(problem: XenbackendError) -> bool:
    return isinstance(problem, DriverError) and problem.errno == errno.EBUSY


def main(arguments: list[str]) -> int:
    """Serve the vbd whose supervisor is at the other end of the socket given by number."""
    if len(arguments) != 2 or arguments[0] != "--socket" or not arguments[1].isdecimal():
        print("a worker is started by the service, with --socket and the number of a descriptor", file=sys.stderr)
        return 2
    channel = socket.socket(fileno=int(arguments[1]))
    try:
        Worker(channel).run()
    except (BrokenPipeError, ConnectionResetError):  # the supervisor went away while we spoke
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
