"""A link between workers and a server that listens at a unix socket, with the faults that a network has.

Must not repeat, reorder or make up bytes. The end of a connection is what a successor relies on, so the worker sees it
only when the server has ended its own; `Fault.HALF` alone does otherwise.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

_ROOM = 1 << 16
_LOOK_S = 0.05
_LATE_S = 0.02
_LONGEST_S = 2.6  # of a fault: longer than the chains' `timeout`


class Fault(Enum):
    """What a link does to the connections that it has."""

    STALL = "nothing comes through, and nothing is closed"
    DELAY = "each piece comes late"
    DROP = "the connection ends"
    CUT_REQUEST = "it ends within what the worker sends"
    CUT_REPLY = "it ends within what the server sends"
    HALF = "it ends towards the worker only, while the server still gets what was sent"


class Link:
    """Accepts connections at `path`, and makes one to `server` for each. Use it as a context manager.

    counts    how often each fault was had by a connection
    """

    def __init__(self, path: Path, server: Path) -> None:
        """Start nothing yet."""
        self.path = path
        self.counts = dict.fromkeys(Fault, 0)
        self._server = server
        self._lanes: list[_Lane] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._is_over = threading.Event()
        self._ends_ns = 0

    def has_fault(self, since_ns: int) -> bool:
        """Return whether there was a fault at that time of the monotonic clock, or is one now."""
        return self._ends_ns > since_ns

    def fail(self, fault: Fault, random: Random) -> None:
        """Have a fault on each connection; one that lasts is over by itself."""
        seconds = random.choice((0.05, 0.2, 0.5, _LONGEST_S)) if fault is Fault.STALL else 0.3
        self._ends_ns = time.monotonic_ns() + int(seconds * 1e9)
        for lane in self._alive():
            self.counts[fault] += 1
            lane.fail(fault, self._ends_ns, random.random())

    def _alive(self) -> list[_Lane]:
        with self._lock:
            self._lanes = [lane for lane in self._lanes if lane.is_alive()]
            return self._lanes

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for lane in self._alive():
            lane.close()

    def _accept(self) -> None:
        while not self._is_over.is_set():
            if not select.select([self._listener], [], [], _LOOK_S)[0]:
                continue
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            if far.connect_ex(str(self._server)):  # as a host refuses whose server is away
                near.close()
                far.close()
                continue
            with self._lock:
                self._lanes.append(_Lane(near, far))


class _Lane:
    """One connection: two threads, one for each direction."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._near, self._far = near, far
        self._stalls_until_ns = self._is_late_until_ns = 0
        self._late_s = 0.0  # by which each piece is late
        self._cut: dict[socket.socket, float] = {}  # share of the next piece that still comes, by who sends it
        self._is_over = threading.Event()
        self._ended = 0  # directions
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._carry, args=[near, far, self._to_server_ended], daemon=True),
            threading.Thread(target=self._carry, args=[far, near, self._to_worker_ended], daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Return whether it still carries anything."""
        return any(thread.is_alive() for thread in self._threads)

    def fail(self, fault: Fault, until_ns: int, share: float) -> None:
        """Have a fault; `share` of the piece that it cuts still comes through."""
        match fault:
            case Fault.STALL:
                self._stalls_until_ns = until_ns
            case Fault.DELAY:
                self._late_s, self._is_late_until_ns = share * _LATE_S, until_ns
            case Fault.DROP:
                self._shut(self._far, socket.SHUT_WR)
            case Fault.CUT_REQUEST:
                self._cut[self._near] = share
            case Fault.CUT_REPLY:
                self._cut[self._far] = share
            case Fault.HALF:
                self._shut(self._near, socket.SHUT_WR)

    def close(self) -> None:
        """End both connections and the threads."""
        self._is_over.set()
        for each in (self._near, self._far):
            self._shut(each, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _carry(self, source: socket.socket, sink: socket.socket, ended: Callable[[], None]) -> None:
        """Carry what `source` sends until it ends, and then say so; after a cut, read on and carry nothing."""
        is_cut = False
        with suppress(OSError):
            while piece := source.recv(_ROOM):
                self._hold()
                if is_cut:
                    continue
                share = self._cut.pop(source, None)
                if share is not None:
                    is_cut = True
                    piece = piece[: int(len(piece) * share)]
                with suppress(OSError):
                    sink.sendall(piece)
                if is_cut:  # the server learns it first, and the worker once the server has ended the connection
                    self._shut(self._far, socket.SHUT_WR)
        self._hold()
        ended()
        with self._lock:
            self._ended += 1
            if self._ended == len(self._threads):
                self._near.close()
                self._far.close()

    def _hold(self) -> None:
        """Wait for as long as the link stalls."""
        if self._is_late_until_ns > time.monotonic_ns():
            self._is_over.wait(self._late_s)
        while (left_s := (self._stalls_until_ns - time.monotonic_ns()) / 1e9) > 0 and not self._is_over.is_set():
            self._is_over.wait(left_s)

    def _to_server_ended(self) -> None:
        self._shut(self._far, socket.SHUT_WR)

    def _to_worker_ended(self) -> None:
        self._shut(self._near, socket.SHUT_RDWR)  # the server has ended: nothing that the worker sends gets anywhere

    @staticmethod
    def _shut(each: socket.socket, how: int) -> None:
        with suppress(OSError):
            each.shutdown(how)
