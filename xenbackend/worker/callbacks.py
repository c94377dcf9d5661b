"""The callbacks of one layer: watched descriptors, timers, finished threads; stopped if they keep failing.

Must not know what a callback is for.

A callback that fails is a bug of its layer (D8). If it is called for a descriptor that stays readable, it would fail
again at once, and keep a processor busy. So after BURST failures (one more is allowed every REFILL_S) no callback of
the layer is called until `resume`, which then calls those that were due meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.budget import Bucket

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

BURST = 10  # failures
REFILL_S = 60.0

Call = Callable[[], None]


class Callbacks:
    """The callbacks of the layer that people know as `layer`; `on_stopped` gets a sentence when they are stopped."""

    def __init__(self, reactor: Reactor, layer: str, on_stopped: Callable[[str], None]) -> None:
        self._reactor = reactor
        self._layer = layer
        self._on_stopped = on_stopped
        self._failures = Bucket(BURST, REFILL_S, reactor.now)
        self._watched: dict[int, tuple[Call, bool]] = {}  # by descriptor: its callback, and whether it wants to write
        self._held: list[Call] = []
        self.is_stopped = False

    def watch(self, fd: int, callback: Call) -> None:
        """As `block.driver.Env.watch`."""
        self._watched[fd] = callback, False
        if not self.is_stopped:
            self._reactor.add(fd, partial(self._call, callback))

    def want(self, fd: int, *, writable: bool) -> None:
        """As `block.driver.Env.want`."""
        self._watched[fd] = self._watched[fd][0], writable
        if not self.is_stopped:
            self._reactor.want(fd, writable=writable)

    def unwatch(self, fd: int) -> None:
        """As `block.driver.Env.unwatch`."""
        del self._watched[fd]
        if not self.is_stopped:
            self._reactor.remove(fd)

    def call_later(self, delay_s: float, function: Call) -> None:
        """As `block.driver.Env.call_later`."""
        self._reactor.call_later(delay_s, partial(self._call_or_hold, function))

    def run_in_thread(self, function: Call, then: Call) -> None:
        """As `block.driver.Env.run_in_thread`."""
        self._reactor.run_in_thread(function, partial(self._call_or_hold, then))

    def call_soon_threadsafe(self, function: Call) -> None:
        """As `block.driver.Env.call_soon_threadsafe`."""
        self._reactor.call_soon_threadsafe(partial(self._call_or_hold, function))

    def resume(self) -> None:
        """Watch again after a stop, and call what was due meanwhile."""
        if not self.is_stopped:
            return
        self.is_stopped = False
        self._failures = Bucket(BURST, REFILL_S, self._reactor.now)
        for fd, (callback, writable) in self._watched.items():
            self._reactor.add(fd, partial(self._call, callback))
            if writable:
                self._reactor.want(fd, writable=True)
        held, self._held = self._held, []
        for function in held:
            self._reactor.call_soon(partial(self._call_or_hold, function))

    def _call_or_hold(self, function: Call) -> None:
        if self.is_stopped:
            self._held.append(function)
        else:
            self._call(function)

    def _call(self, function: Call) -> None:
        try:
            function()
        except Exception as bug:
            has_budget = self._failures.take() is not None
            if not has_budget and not self.is_stopped:
                self._stop(bug)
            self._reactor.bug(bug)

    def _stop(self, bug: Exception) -> None:
        self.is_stopped = True
        for fd in self._watched:
            self._reactor.remove(fd)
        self._on_stopped(
            f"the layer {self._layer} fails again and again ({type(bug).__name__}: {bug}), so it is not called any "
            "more; the disk waits: let it try again with `xenbackend resume`"
        )
