"""A worker process of ours as a bench runs it: with a rig for its host, and told what a supervisor would tell it.

Must not measure.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
import time
from pathlib import Path
from typing import TypeVar

from xenbackend import counters, journal
from xenbackend.bench.plan import BenchError
from xenbackend.bench.server import Server
from xenbackend.protocol import messages

_PATIENCE = 20.0  # seconds for an answer; opening a chain tries again for ten
M = TypeVar("M")


class Worker:
    """A worker with one open chain. Raises: BenchError, with the worker's own sentence when it refuses."""

    def __init__(
        self, chain: str, rig: Path, domid: int, *, read_only: bool, cpu: int | None, never_looks: bool = False
    ) -> None:
        """Start it on CPU number `cpu`, if not None. `never_looks`: it sleeps whenever the ring is empty."""
        self.name = chain
        self._settings = {"poll_us": 0} if never_looks else {}
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
        memory = os.memfd_create("journal")
        os.ftruncate(memory, journal.SIZE)
        self._counters = memoryview(mmap.mmap(memory, counters.SIZE))
        # Shareable: several chains are measured in turn on one file.
        message = messages.Open(
            f"vbd/{domid}/51712",
            f"xenbackend.rig.host:{rig}",
            domid,
            chain,
            read_only,
            shareable=True,
            settings=self._settings,
        )
        try:
            socket.send_fds(self._socket, [messages.encode(message)], [memory])
        finally:
            os.close(memory)
        return self._expect(messages.Opened).layers[0].size

    def connect(self, parameters: messages.Connect) -> None:
        """Let it serve a frontend's rings."""
        self._socket.send(messages.encode(parameters))
        self._expect(messages.Connected)

    def rested_s(self) -> float:
        """Return for how many seconds, since some moment, it has not looked for requests before it slept.

        Raises: BenchError.
        """
        self._socket.send(messages.encode(messages.Report()))
        self._expect(messages.Standing)  # it has brought its counters up to date
        counted = counters.snapshot(self._counters)
        may_look = counted["look_ns"] or counted["rests"]
        return counted["rested_ns"] / 1e9 if may_look else time.monotonic()

    def _expect(self, kind: type[M]) -> M:
        while True:
            try:
                datagram, descriptors, _, _ = socket.recv_fds(self._socket, messages.MAX_MESSAGE, 8)
            except (TimeoutError, ConnectionResetError):
                datagram, descriptors = b"", []
            for descriptor in descriptors:  # what a worker wants kept; there will be no successor
                os.close(descriptor)
            if not datagram:
                raise BenchError(f"{self.name} does not answer: {self.server.last_words()}")
            message = messages.decode(datagram)
            if isinstance(message, kind):
                return message
            if isinstance(message, messages.Failed):
                raise BenchError(f"{self.name}: {message.sentence}")

    def close(self) -> None:
        """Ask it to close the chain, and end it."""
        with contextlib.suppress(OSError, BenchError):  # it may have died; whoever measured it has said so
            self._socket.send(messages.encode(messages.Close()))
            self._expect(messages.Closed)
        self._socket.close()
        self.server.close()
