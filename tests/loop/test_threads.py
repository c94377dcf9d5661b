"""Tests of `xenbackend.loop.threads`."""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from xenbackend.loop.threads import Threads

Calls = SimpleQueue[Callable[[], object]]


def never(error: Exception) -> Callable[[], object]:
    """Fail: no exception is expected."""
    raise AssertionError(error)


def test_then_comes_after_function() -> None:
    """A thread's function has ended before `then` is handed over, and the caller calls `then`."""
    calls: Calls = SimpleQueue()
    threads = Threads(calls.put)
    order: list[str] = []
    threads.run(lambda: order.append("function"), lambda: order.append("then"), never)
    then = calls.get(timeout=10)
    before = list(order)
    then()
    threads.close()

    assert (before, order) == (["function"], ["function", "then"])


def test_an_idle_thread_keeps_nothing() -> None:
    """Once `then` has been handed over, a thread that waits for work keeps neither call, nor what they belong to: with
    a request of a chain that was closed, it would keep all of that chain's memory.
    """

    class Chain:
        def do(self) -> None:
            pass

    calls: Calls = SimpleQueue()
    threads = Threads(calls.put)
    chain = Chain()
    kept = weakref.ref(chain)
    threads.run(chain.do, chain.do, never)
    del chain
    calls.get(timeout=10)()

    assert kept() is None
    threads.close()


def test_threads_are_started_as_needed_and_bounded() -> None:
    """An idle thread is reused; another one is started only if all are busy, up to the limit."""
    calls: Calls = SimpleQueue()
    threads = Threads(calls.put, limit=3)
    start = threading.active_count()
    for _ in range(5):
        threads.run(int, int, never)
        calls.get(timeout=10)()
    one = threading.active_count() - start
    gate = threading.Event()
    for _ in range(8):
        threads.run(gate.wait, int, never)
    three = threading.active_count() - start
    gate.set()
    for _ in range(8):
        calls.get(timeout=10)()
    threads.close()

    assert (one, three, threading.active_count() - start) == (1, 3, 0)


def test_error_is_handed_over_before_then() -> None:
    """An exception is handed over as what `on_error` made of it, and `then` is called as well."""
    calls: Calls = SimpleQueue()
    threads = Threads(calls.put)
    order: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    threads.run(fail, lambda: order.append("then"), lambda error: lambda: order.append(str(error)))
    for _ in range(2):
        calls.get(timeout=10)()
    threads.close()

    assert order == ["broken", "then"]


def test_a_thread_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, work waits for the running ones, or is refused if there is none; it recovers."""
    calls: Calls = SimpleQueue()
    threads = Threads(calls.put)
    start, is_full = threading.Thread.start, [True]

    def try_to_start(thread: threading.Thread) -> None:
        if is_full:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", try_to_start)
    with pytest.raises(RuntimeError, match="new thread"):
        threads.run(int, int, never)
    is_full.clear()
    gate, done = threading.Event(), []
    threads.run(gate.wait, lambda: done.append("first"), never)
    is_full.append(True)
    threads.run(int, lambda: done.append("second"), never)
    gate.set()
    for _ in range(2):
        calls.get(timeout=10)()
    threads.close()

    assert ["first", "second"] == done
