"""Turns signals into calls from a loop.

Must not decide what a signal means.

Python calls a handler between two bytecode instructions, so a signal that arrives just before the loop goes to sleep
would be handled only when something else wakes the loop. Therefore the interpreter's C handler, which runs at once,
writes the signal's number into a descriptor that the loop watches.
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
    """Call `take` from the loop with the number of each of these signals that arrives. Only for the main thread."""

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
