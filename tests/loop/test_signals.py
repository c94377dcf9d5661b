"""Signals as calls of a loop."""

from __future__ import annotations

import os
import signal

from descriptors import open_descriptors

from xenbackend.loop.reactor import Reactor
from xenbackend.loop.signals import taking_signals


def test_a_signal_is_a_call_of_the_loop() -> None:
    """Each signal is a call from the loop, once, even if the loop sleeps; afterwards the former handlers are back."""
    before, handler = open_descriptors(), signal.getsignal(signal.SIGUSR1)
    loop = Reactor()
    taken: list[int] = []

    def take(number: int) -> None:
        taken.append(number)
        if number == signal.SIGUSR2:
            loop.stop()

    with taking_signals(loop, (signal.SIGUSR1, signal.SIGUSR2), take):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [] == taken
        loop.call_later(0.01, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        loop.run()
    loop.close()

    assert [signal.SIGUSR1, signal.SIGUSR2] == taken
    assert (before, handler) == (open_descriptors(), signal.getsignal(signal.SIGUSR1))


def test_another_signal_is_not_taken() -> None:
    """Another handler of a signal is still called, and its number is delivered to nobody else."""
    loop = Reactor()
    taken: list[int] = []
    others: list[int] = []
    former = signal.signal(signal.SIGUSR2, lambda number, _: others.append(number))
    try:
        with taking_signals(loop, (signal.SIGUSR1,), taken.append):
            os.kill(os.getpid(), signal.SIGUSR2)
            loop.call_soon(loop.stop)
            loop.run()
    finally:
        signal.signal(signal.SIGUSR2, former)
    loop.close()

    assert ([], [signal.SIGUSR2]) == (taken, others)
