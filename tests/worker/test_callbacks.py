"""Tests of `xenbackend.worker.callbacks`: what a layer watches, and a layer that fails again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from xenbackend.loop.reactor import Reactor
from xenbackend.worker.callbacks import BURST, Callbacks


@pytest.fixture
def bugs() -> list[Exception]:
    """The exceptions that callbacks have raised."""
    return []


@pytest.fixture
def reactor(bugs: list[Exception]) -> Iterator[Reactor]:
    """Return a loop that records exceptions."""
    made = Reactor(on_bug=bugs.append)
    yield made
    made.close()


@pytest.fixture
def ready() -> Iterator[int]:
    """Return a descriptor that stays readable."""
    fd = os.eventfd(1, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def turn(reactor: Reactor, passes: int = 1) -> None:
    """Let the loop make some passes."""
    for _ in range(passes):
        reactor.call_soon(reactor.stop)
        reactor.run()


def fail() -> None:
    """Raise an exception, as a bug would."""
    raise KeyError("x")


def test_a_descriptor_is_watched_until_it_is_not(reactor: Reactor, ready: int) -> None:
    """A callback is called while its descriptor is readable, and while it is writable if that is wanted, until
    `unwatch`.
    """
    seen: list[int] = []
    callbacks = Callbacks(reactor, "log:", pytest.fail)
    callbacks.watch(ready, lambda: seen.append(1))
    turn(reactor)
    os.eventfd_read(ready)
    turn(reactor)
    callbacks.want(ready, writable=True)
    turn(reactor)
    callbacks.want(ready, writable=False)
    turn(reactor)
    os.eventfd_write(ready, 1)
    callbacks.unwatch(ready)
    turn(reactor)
    assert [1, 1] == seen


def test_a_layer_that_fails_for_ever_is_stopped(reactor: Reactor, ready: int, bugs: list[Exception]) -> None:
    """After too many failures none of a layer's callbacks are called any more, a sentence names the layer, and the loop
    can sleep again.
    """
    stopped: list[str] = []
    callbacks = Callbacks(reactor, "log:", stopped.append)
    callbacks.watch(ready, fail)
    turn(reactor, BURST + 5)
    called: list[str] = []
    callbacks.call_later(0, lambda: called.append("later"))
    callbacks.call_soon_threadsafe(lambda: called.append("thread"))
    callbacks.run_in_thread(lambda: called.append("in it"), lambda: called.append("then"))
    while len(called) < 1:
        turn(reactor)
    turn(reactor, 5)
    assert BURST + 1 == len(bugs)
    assert ["in it"] == called
    assert "the layer log: fails again and again (KeyError: 'x')" in stopped[0]
    assert 1 == len(stopped)


def test_a_layer_that_is_resumed_goes_on_where_it_was(reactor: Reactor, ready: int, bugs: list[Exception]) -> None:
    """When a stopped layer is resumed, calls that fell due are made, and its descriptors are watched again; it may be
    stopped once more.
    """
    stopped: list[str] = []
    wrong = [True]
    callbacks = Callbacks(reactor, "log:", stopped.append)
    seen: list[str] = []
    callbacks.watch(ready, lambda: fail() if wrong else seen.append("ready"))
    turn(reactor, BURST + 1)
    callbacks.call_later(0, lambda: seen.append("later"))
    turn(reactor, 2)
    callbacks.resume()
    turn(reactor, BURST + 1)
    assert 2 == len(stopped)
    wrong.clear()
    callbacks.resume()
    turn(reactor, 2)
    assert {"ready", "later"} == set(seen)
    assert 2 * (BURST + 1) == len(bugs)


def test_what_is_watched_while_stopped_is_watched_later(reactor: Reactor, ready: int) -> None:
    """A layer may change what it watches while it is stopped; that takes effect when it is resumed."""
    stopped: list[str] = []
    seen: list[int] = []
    callbacks = Callbacks(reactor, "log:", stopped.append)
    callbacks.watch(ready, fail)
    turn(reactor, BURST + 1)
    callbacks.unwatch(ready)
    callbacks.watch(ready, lambda: seen.append(1))
    callbacks.want(ready, writable=True)
    turn(reactor)
    assert not seen
    callbacks.resume()
    turn(reactor)
    assert seen
    callbacks.unwatch(ready)
