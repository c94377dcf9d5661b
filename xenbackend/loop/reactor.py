"""The loop of each process: readiness of descriptors, timers, calls from threads, hooks before it sleeps.

Must not know blkif, a request or a file; must not wake up without a reason.

One pass, for ever until `stop`:

    calls asked for by call_soon -> hooks -> sleep until a descriptor, a timer or a thread -> timers -> callbacks

A callback may be called once more for a descriptor that another callback of the same pass has just taken care of:
every callback must bear finding nothing to do.
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
_SLEEPER_RETRY_S = 0.1  # after it could not wait
_EVENTS = 64  # descriptors per pass; more come in the next one
_LONGEST_S = 86400.0  # that it sleeps at once: epoll_wait takes no more than 2**31 ms
_TIMERS_S = 0.02  # of a pass for timers, where more than one is due; descriptors wait no longer for their turn


class Sleeper(Protocol):
    """Something that waits for its own things and for the loop's descriptors at once, by one system call."""

    in_flight: int  # its own things; while there are none the loop sleeps without it

    def wait(self, timeout_s: float | None) -> bool:
        """Sleep; True if a descriptor of the loop (`Reactor.fileno`) may be ready."""

    def deliver(self) -> None:
        """Act on what it waited for."""


class Timer:
    """One time at which something is due. It may be set anew any number of times; only the last setting counts."""

    def __init__(self, reactor: Reactor, callback: Call) -> None:
        """Call `callback` from the loop when it is due."""
        self.due: float | None = None
        self._reactor = reactor
        self._callback = callback
        self._wakes_at: float | None = None  # the earliest that the loop was asked for

    def set(self, when: float | None) -> None:
        """Be due at `when`, by the loop's clock, and never before; None: not at all."""
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
    """A loop in one thread. Only `call_soon_threadsafe` may be called from another one.

    Args:
        clock: seconds, never going back.
        on_bug: gets the exceptions that callbacks, hooks and the sleeper let out; without it they end `run`.
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
        """Call `callback` whenever `fd` is readable or broken; with `edge`, only when it becomes so once more.

        With `writable` it is called when `fd` can be written to, or is broken, instead.
        """
        self._epoll.register(fd, (select.EPOLLOUT if writable else select.EPOLLIN) | (select.EPOLLET if edge else 0))
        self._callbacks[fd] = callback

    def want(self, fd: int, *, writable: bool) -> None:
        """Call the callback of `fd`, which was added for reading, also while it can be written to; or no longer."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if writable else 0))

    def remove(self, fd: int) -> None:
        """Forget `fd`; call this before closing it."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)
        for place, (ready, _) in enumerate(self._ready):
            if ready == fd:  # whatever gets the number in this pass is not what was ready
                self._ready[place] = (-1, 0)

    def before_sleep(self, hook: Callable[[], bool]) -> None:
        """Call `hook` in every pass before sleeping; when it returns True this pass does not sleep."""
        self._hooks.append(hook)

    def remove_hook(self, hook: Callable[[], bool]) -> None:
        """Forget a hook."""
        self._hooks.remove(hook)

    def sleep_by(self, sleeper: Sleeper | None) -> None:
        """Sleep in `sleeper` while it has something in flight."""
        self._sleeper = sleeper

    def fileno(self) -> int:
        """Return a descriptor that is readable while one of the loop's is."""
        return self._epoll.fileno()

    def call_soon(self, function: Call) -> None:
        """Call `function` at the beginning of the next pass."""
        self._soon.append(function)

    def call_later(self, delay_s: float, function: Call) -> None:
        """Call `function` after `delay_s` seconds; equal times in the order of asking."""
        heapq.heappush(self._timers, (self.now() + delay_s, next(self._order), function))

    def timer(self, callback: Call) -> Timer:
        """Return a time that can be set and set anew, at which `callback` is called."""
        return Timer(self, callback)

    def call_soon_threadsafe(self, function: Call) -> None:
        """Call `function` from the loop, soon; for other threads and for signal handlers."""
        self._from_threads.append(function)
        os.eventfd_write(self._wake, 1)

    def run_in_thread(self, function: Call, then: Call) -> None:
        """Call `function` in a thread of a small pool, and afterwards `then` from the loop.

        Should `function` let an exception out, it is dealt with as a callback's, and `then` is called all the same.
        """
        self._threads.run(function, then, partial(partial, self.bug))

    def bug(self, error: Exception) -> None:
        """Deal with an exception that somebody has contained as with one that a callback let out."""
        if self._on_bug is None:
            raise error
        self._on_bug(error)

    def stop(self) -> None:
        """Let `run` return after this pass."""
        self._stopped = True

    def run(self) -> None:
        """Serve until `stop`. Raises: what a callback raises, unless there is an `on_bug`."""
        self._stopped = False
        while not self._stopped:
            self._pass()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Serve until `is_done`, also from inside a callback. Raises: as `run`."""
        ready = self._ready
        while not is_done():
            self._pass()
        self._ready = ready  # of the pass that goes on now

    def close(self) -> None:
        """Wait for the threads, then release everything; nothing is called any more."""
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
        except Exception as error:  # the host refused: the loop's own descriptors are served on, and it is tried again
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
        while self._timers and self._timers[0][0] <= now:  # one asked for by a timer waits for the next pass
            due.append(heapq.heappop(self._timers))
        while due:
            self._call(due.popleft()[2])
            if self.now() - now >= _TIMERS_S:
                break
        for timer in due:
            heapq.heappush(self._timers, timer)

    def _take_from_threads(self) -> None:
        os.eventfd_read(self._wake)  # before looking: what is appended later wakes us again
        calls = self._from_threads
        for _ in range(len(calls)):
            self._call(calls.popleft())
