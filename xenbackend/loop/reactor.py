"""The loop of each process: readiness of descriptors, timers, calls from threads, hooks before it sleeps.

Must not know blkif, a request or a file; must not wake up without a reason.

It repeats this pass until `stop`:

    calls queued by call_soon -> hooks -> sleep until a descriptor, a timer or a thread -> timers -> callbacks

A callback may be called for a descriptor that another callback of the same pass has just handled, so every callback
must cope with finding nothing to do.
"""

from __future__ import annotations

import heapq
import os
import select
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Protocol

from xenbackend.loop.threads import Threads

Call = Callable[[], object]
_SLEEPER_RETRY_S = 0.1  # until the sleeper is tried again after its `wait` has failed
_EVENTS = 64  # descriptors per pass; others follow in the next pass
_LONGEST_S = 86400.0  # of one sleep: epoll_wait takes at most 2**31 ms
_TIMERS_S = 0.02  # for timers in one pass, if several are due, so that descriptors need not wait longer


class Sleeper(Protocol):
    """Waits for completions of its own and for the loop's descriptors at the same time, by one system call."""

    in_flight: int  # its own operations; while there are none, the loop sleeps without it

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep. Return whether a descriptor of the loop (`Reactor.fileno`) may be ready."""

    def deliver(self) -> None:
        """Handle the completions for which it waited."""


class Timer:
    """A timer that can be set again any number of times; only the last setting counts."""

    def __init__(self, reactor: Reactor, callback: Call) -> None:
        """Call `callback` from the loop when the timer is due."""
        self.due: float | None = None
        self._reactor = reactor
        self._callback = callback
        self._wakes_at: float | None = None  # the earliest time for which a call of the loop is pending

    def set(self, when: float | None) -> None:
        """Make the timer due at `when`, by the loop's clock, and never earlier; None cancels it."""
        self.due = when
        if when is not None and (self._wakes_at is None or when < self._wakes_at):
            self._wakes_at = when
            self._reactor.call_later(when - self._reactor.now(), self._wake)

    def _wake(self) -> None:
        now = self._reactor.now()
        if self._wakes_at is not None and now >= self._wakes_at:
            self._wakes_at = None
        if self.due is None:
            return
        if now >= self.due:
            self.due = None
            self._callback()
        else:
            self.set(self.due)


class Reactor:
    """A loop in one thread. Other threads may only call `call_soon_threadsafe`.

    Args:
        clock: a monotonic clock, in seconds.
        on_bug: gets the exceptions that callbacks, hooks and the sleeper raise; without it they end `run`.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, on_bug: Callable[[Exception], None] | None = None
    ) -> None:
        self.now = clock
        self._on_bug = on_bug
        self._epoll = select.epoll()
        self._callbacks: dict[int, Call] = {}
        self._ready: list[tuple[int, int]] = []  # of this pass
        self._soon: deque[Call] = deque()
        self._timers: list[tuple[float, int, Call]] = []
        self._order = count()
        self._hooks: list[Callable[[], bool]] = []
        self._sleeper: Sleeper | None = None
        self._stopped = False
        self._from_threads: deque[Call] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = Threads(self.call_soon_threadsafe)
        self.add(self._wake, self._take_from_threads)

    def add(self, fd: int, callback: Call, *, edge: bool = False, writable: bool = False) -> None:
        """Call `callback` while `fd` is readable or broken; with `edge`, only each time it becomes so (EPOLLET).

        With `writable`, call it while `fd` is writable or broken instead.
        """
        self._epoll.register(fd, (select.EPOLLOUT if writable else select.EPOLLIN) | (select.EPOLLET if edge else 0))
        self._callbacks[fd] = callback

    def add_for_end(self, fd: int, callback: Call) -> None:
        """Call `callback` while `fd` is broken or its other end is closed in both directions, for nothing else."""
        self._epoll.register(fd, 0)  # epoll_ctl(2): EPOLLERR and EPOLLHUP are always reported
        self._callbacks[fd] = callback

    def want(self, fd: int, *, writable: bool) -> None:
        """Set whether the callback of `fd`, which was added for reading, is also called while `fd` is writable."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if writable else 0))

    def remove(self, fd: int) -> None:
        """Forget `fd`; call this before closing it."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)
        for place, (ready, _) in enumerate(self._ready):
            if ready == fd:  # a new file that gets this number in the same pass was not ready
                self._ready[place] = (-1, 0)

    def before_sleep(self, hook: Callable[[], bool]) -> None:
        """Call `hook` in every pass before sleeping; if it returns True, this pass does not sleep."""
        self._hooks.append(hook)

    def remove_hook(self, hook: Callable[[], bool]) -> None:
        """Forget a hook."""
        self._hooks.remove(hook)

    def sleep_by(self, sleeper: Sleeper | None) -> None:
        """Sleep by `sleeper` while it has operations in flight; None: always sleep without one."""
        self._sleeper = sleeper

    def fileno(self) -> int:
        """Return a descriptor that is readable while any descriptor of the loop is ready."""
        return self._epoll.fileno()

    def call_soon(self, function: Call) -> None:
        """Call `function` at the beginning of the next pass."""
        self._soon.append(function)

    def call_later(self, delay_s: float, function: Call) -> None:
        """Call `function` after `delay_s` seconds; calls for the same time keep their order."""
        heapq.heappush(self._timers, (self.now() + delay_s, next(self._order), function))

    def timer(self, callback: Call) -> Timer:
        """Return a timer that calls `callback`; it is not set yet."""
        return Timer(self, callback)

    def call_soon_threadsafe(self, function: Call) -> None:
        """Call `function` soon from the loop; for other threads and for signal handlers."""
        self._from_threads.append(function)
        os.eventfd_write(self._wake, 1)

    def run_in_thread(self, function: Call, then: Call) -> None:
        """Call `function` in a thread of a small pool, and afterwards `then` from the loop.

        An exception from `function` is handled like one from a callback, and `then` is called all the same.
        """
        self._threads.run(function, then, partial(partial, self.bug))

    def bug(self, error: Exception) -> None:
        """Handle an exception that a caller has caught like one from a callback. Raises: it, without `on_bug`."""
        if self._on_bug is None:
            raise error
        self._on_bug(error)

    def stop(self) -> None:
        """Make `run` return after this pass."""
        self._stopped = True

    def run(self) -> None:
        """Run until `stop`. Raises: what a callback raises, unless there is an `on_bug`."""
        self._stopped = False
        while not self._stopped:
            self._pass()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Run until `is_done`; may be called from a callback, too. Raises: as `run`."""
        ready = self._ready
        while not is_done():
            self._pass()
        self._ready = ready  # of the outer pass, which continues now

    def close(self) -> None:
        """Wait for the threads, then release everything. Nothing is called afterwards."""
        self._threads.close()
        self._epoll.close()
        os.close(self._wake)

    def _pass(self) -> None:
        soon = self._soon
        for _ in range(len(soon)):
            self._call(soon.popleft())
        awake = False
        for hook in self._hooks:
            try:
                awake |= hook()
            except Exception as error:
                self.bug(error)
        self._ready = ready = self._wait(0 if awake or soon or self._stopped else self._until_timer())
        if self._timers:
            self._run_timers()
        callbacks = self._callbacks
        for fd, _ in ready:
            callback = callbacks.get(fd)
            if callback is not None:
                self._call(callback)

    def _wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        sleeper = self._sleeper
        if sleeper is None or not sleeper.in_flight:
            return self._epoll.poll(timeout_s, _EVENTS)
        try:
            may_be_ready = sleeper.wait(timeout_s)
        except Exception as error:  # the loop's own descriptors are served until the next attempt
            self.bug(error)
            retry_s = _SLEEPER_RETRY_S
            return self._epoll.poll(retry_s if timeout_s is None else min(timeout_s, retry_s), _EVENTS)
        self._call(sleeper.deliver)
        return self._epoll.poll(0, _EVENTS) if may_be_ready else []

    def _call(self, function: Call) -> None:
        try:
            function()
        except Exception as error:  # D8: a bug of one layer must not end the others
            self.bug(error)

    def _until_timer(self) -> float | None:
        return min(max(0.0, self._timers[0][0] - self.now()), _LONGEST_S) if self._timers else None

    def _run_timers(self) -> None:
        now = self.now()
        due = deque[tuple[float, int, Call]]()
        while self._timers and self._timers[0][0] <= now:  # a call that a timer adds waits for the next pass
            due.append(heapq.heappop(self._timers))
        while due:
            self._call(due.popleft()[2])
            if self.now() - now >= _TIMERS_S:
                break
        for timer in due:
            heapq.heappush(self._timers, timer)

    def _take_from_threads(self) -> None:
        os.eventfd_read(self._wake)  # first, so that calls appended later wake us again
        calls = self._from_threads
        for _ in range(len(calls)):
            self._call(calls.popleft())
