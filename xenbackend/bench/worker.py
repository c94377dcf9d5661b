"""One of our worker processes as a bench runs it: on a rig, with the bench in the role of the supervisor.

Must not measure.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

from xenbackend import counters, journal
from xenbackend.bench.plan import BenchError
from xenbackend.bench.server import Server
from xenbackend.kernel import memfd
from xenbackend.protocol import codec, datagrams, jobs, messages, opening
from xenbackend.protocol.messages import Stage

_PATIENCE = 20.0  # seconds for an answer; a worker retries for ten seconds to open a chain
POLL_US = 60  # the service's default: a sleeping guest needs about 40 us to wake up and send the next request


class Worker:
    """A worker with one open chain. Raises: BenchError, with the worker's own message if it refuses."""

    def __init__(
        self, chain: str, rig: Path, domid: int, *, read_only: bool, cpu: int | None, never_looks: bool = False
    ) -> None:
        """Start it, on CPU number `cpu` if not None. `never_looks`: it sleeps as soon as the ring is empty."""
        self.name = chain
        self._poll_us = 0 if never_looks else POLL_US
        self._number = 0  # of the last order
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_PATIENCE)
        with theirs:
            arguments = [sys.executable, "-m", "xenbackend.worker.main", "--socket", str(theirs.fileno())]
            self.server = Server(chain, arguments, rig / f"worker-{domid}.log", cpu=cpu, keep=[theirs.fileno()])
        try:
            self.size = self._open(chain, rig, domid, read_only=read_only)
        except BaseException:
            self._socket.close()
            self.server.close()
            raise

    def _open(self, chain: str, rig: Path, domid: int, *, read_only: bool) -> int:
        memory = memfd.make("journal", journal.SIZE)
        self._counters = memfd.map_sealed(memory, journal.SIZE)[: counters.SIZE]
        order = messages.Open(
            self._next_number(),
            f"vbd/{domid}/51712",
            f"xenbackend.rig.host:{rig}",
            domid,
            chain,
            read_only,
            shareable=True,  # several chains are measured in turn on the same file
            poll_us=self._poll_us,
        )
        try:
            self._send_with_opener(order, memory, rig)
        finally:
            os.close(memory)
        return self._expect(Stage.OPEN).layers[0].size

    def _send_with_opener(self, order: messages.Open, memory: int, rig: Path) -> None:
        """Send the order with the socket of an opener, and acknowledge what it opens until the worker closes it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, far:
            ours.settimeout(_PATIENCE)
            with theirs:
                arguments = [sys.executable, "-m", "xenbackend.opener.main", "--socket", str(theirs.fileno())]
                log = rig / f"opener-{order.frontend_domid}.log"
                opener = Server(self.name, arguments, log, cpu=None, keep=[theirs.fileno()])
            try:
                job = jobs.Job(
                    order.vbd,
                    [order.chain],
                    order.read_only,
                    shareable=order.shareable,
                    host=order.host,
                    frontend_domid=order.frontend_domid,
                    scratch=str(rig),
                )
                with near:
                    datagrams.send(ours, opening.encode(job), [far.fileno()])
                    far.close()
                    datagrams.send(self._socket, codec.encode(order), [memory, near.fileno()])
                self._keep_nothing(ours)
            finally:
                opener.close()

    def _keep_nothing(self, opener: socket.socket) -> None:
        """Acknowledge each descriptor that the opener reports, and close our copy: there will be no successor."""
        while True:
            try:
                datagram, descriptors, _ = datagrams.receive(opener, opening.MAX_MESSAGE, 1)
            except (TimeoutError, ConnectionResetError):
                return
            for descriptor in descriptors:
                os.close(descriptor)
            if not datagram:
                return
            opener.send(opening.encode(opening.Ack()))

    def connect(self, parameters: messages.Connect) -> None:
        """Make it serve a frontend's rings. Raises: BenchError."""
        self._socket.send(codec.encode(messages.Serve(self._next_number(), parameters)))
        self._expect(Stage.SERVING)

    def rested_s(self) -> float:
        """Return for how many seconds, since an arbitrary moment, it has not polled for requests before it slept.

        Raises: BenchError.
        """
        self._socket.send(codec.encode(messages.Report(self._next_number())))
        self._expect()  # then its counters are up to date
        counted = counters.snapshot(self._counters)
        may_look = counted["look_ns"] or counted["rests"]
        return counted["rested_ns"] / 1e9 if may_look else time.monotonic()

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _expect(self, *stages: Stage) -> messages.Standing:
        """Return its standing after the last order, once its stage is one of `stages`, or any if none are given.

        Raises: BenchError.
        """
        while True:
            try:
                datagram, descriptors, _ = datagrams.receive(self._socket, messages.MAX_MESSAGE, 8)
            except (TimeoutError, ConnectionResetError):
                datagram, descriptors = b"", []
            for descriptor in descriptors:  # the worker wants these kept, but there will be no successor
                os.close(descriptor)
            if not datagram:
                raise BenchError(f"{self.name} does not answer: {self.server.last_words()}")
            message = codec.from_worker(datagram)
            if isinstance(message, messages.Standing) and message.number == self._number:
                if message.failure:
                    raise BenchError(f"{self.name}: {message.failure}")
                if not stages or message.stage in stages:
                    return message

    def close(self) -> None:
        """Make it close the chain, and end it."""
        with contextlib.suppress(OSError, BenchError):  # it may have died, which was reported before
            self._socket.send(codec.encode(messages.Close(self._next_number())))
            self._expect(Stage.IDLE)
        self._socket.close()
        self.server.close()
