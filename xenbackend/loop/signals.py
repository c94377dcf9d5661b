"""Signals as calls of a loop.

Must not decide what a signal means.

Python calls a handler between two of its instructions, so a signal that comes just before the loop goes to sleep would
be noticed only when something else wakes it up. So the interpreter's own handler, which runs at once, writes each
number into a descriptor that the loop listens to.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from xenbackend.loop.reactor import Reactor

_PER_READ = 64


@contextmanager
def taking_signals(loop: Reactor, numbers: Iterable[int], take: Callable[[int], object]) -> Iterator[None]:
    """Call `take` from the loop with the number of each of these signals that comes. For the main thread only."""

    def wake() -> None:
        for number in near.recv(_PER_READ):
            if number in former:
                take(number)

    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    former_fd = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    former = {number: signal.signal(number, lambda *_: None) for number in numbers}
    loop.add(near.fileno(), wake)
    try:
        yield
    finally:
        loop.remove(near.fileno())
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        near.close()
        far.close()
