"""Tests of `xenbackend.loop.reactor`; the time is a number that the tests advance."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.loop.reactor import Reactor


class Clock:
    """A clock that stands still until a test advances it."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.time


@pytest.fixture
def clock() -> Clock:
    """Return the time that the reactor sees."""
    return Clock()


@pytest.fixture
def reactor(clock: Clock) -> Iterator[Reactor]:
    """Return a reactor on that time."""
    made = Reactor(clock)
    yield made
    made.close()


def test_a_timer_may_be_due_in_a_hundred_years(reactor: Reactor) -> None:
    """A timer may be years away: the kernel accepts sleeps of up to 24 days, so the loop wakes up and sleeps again."""
    reactor.call_later(100 * 365 * 86400.0, lambda: pytest.fail("it is not its time"))
    reactor.call_soon_threadsafe(lambda: reactor.call_soon_threadsafe(reactor.stop))  # each after a sleep
    reactor.run()

    assert reactor.now() == 100.0


def test_readable_descriptor_is_called(reactor: Reactor) -> None:
    """A callback is called while its descriptor is readable, and no more after the descriptor was removed."""
    reader, writer = os.pipe()
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(reader, 1))
        if len(seen) == 2:
            reactor.remove(reader)
            reactor.call_soon(reactor.stop)

    reactor.add(reader, read)
    os.write(writer, b"abc")
    reactor.run()

    assert seen == [b"a", b"b"]
    os.close(reader)
    os.close(writer)


def test_a_descriptor_that_is_read_may_be_wanted_for_writing(reactor: Reactor) -> None:
    """A descriptor's one callback is also called while the descriptor is writable, for as long as that is wanted."""
    near, far = socket.socketpair()
    seen: list[int] = []
    with near, far:
        reactor.add(near.fileno(), lambda: seen.append(1))
        for writable in (False, True, False):
            reactor.want(near.fileno(), writable=writable)
            reactor.call_soon(reactor.stop)
            reactor.run()
        reactor.remove(near.fileno())

    assert [1] == seen


def test_edges_need_no_read(reactor: Reactor) -> None:
    """A descriptor watched for edges calls once for each write, even if nobody reads it."""
    event = os.eventfd(0)
    calls = []
    reactor.add(event, lambda: calls.append(1), edge=True)
    for _ in range(3):
        os.eventfd_write(event, 1)
        reactor.call_soon(reactor.stop)
        reactor.run()
        reactor.call_soon(reactor.stop)
        reactor.run()

    assert len(calls) == 3
    reactor.remove(event)
    os.close(event)


def test_timers_in_order(reactor: Reactor, clock: Clock) -> None:
    """Timers are called in the order of their times, then of their setting, and none too early."""
    order: list[str] = []
    for delay, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "never")):
        reactor.call_later(delay, lambda name=name: order.append(name))
    seen = []
    for time in (100.5, 101.0, 102.5):
        clock.time = time
        reactor.call_soon(reactor.stop)
        reactor.run()
        seen.append("".join(order))

    assert seen == ["", "ab", "abc"]


def test_timers_that_take_long_let_descriptors_have_their_turn(reactor: Reactor, clock: Clock) -> None:
    """If many timers are due, a pass calls those that it has time for; ready descriptors are served before the rest."""
    seen: list[str] = []
    reading, writing = os.pipe()

    def work(name: str) -> None:
        seen.append(name)
        clock.time += 0.015

    def read() -> None:
        seen.append(os.read(reading, 9).decode())

    for name in "abcd":
        reactor.call_later(1.0, partial(work, name))
    reactor.call_later(1.0, reactor.stop)
    reactor.add(reading, read)
    os.write(writing, b"!")
    clock.time += 1.0
    reactor.run()

    assert ["a", "b", "!", "c", "d"] == seen
    os.close(reading)
    os.close(writing)


def test_calls_asked_for_by_calls_wait_for_the_next_pass(reactor: Reactor) -> None:
    """A call that asks for another call does not delay descriptors."""
    order: list[str] = []
    reader, writer = os.pipe()
    os.write(writer, b"x")

    def again() -> None:
        order.append("call")
        reactor.call_soon(again)

    reactor.add(reader, lambda: (order.append("ready"), reactor.stop()))
    reactor.call_soon(again)
    reactor.run()

    assert order == ["call", "ready"]
    reactor.remove(reader)
    os.close(reader)
    os.close(writer)


def test_threads_wake_the_loop(reactor: Reactor) -> None:
    """A call from another thread runs in the loop's thread, which it wakes even if no timer is set."""
    seen: list[int] = []

    def finish() -> None:
        seen.append(threading.get_ident())
        reactor.stop()

    thread = threading.Thread(target=lambda: reactor.call_soon_threadsafe(finish))
    reactor.call_soon(thread.start)
    reactor.run()
    thread.join()

    assert seen == [threading.get_ident()]


def test_hook_that_found_work_keeps_it_awake(reactor: Reactor) -> None:
    """Hooks are called before sleeping; while one returns True the loop does not sleep, even with nothing to do."""
    calls: list[int] = []

    def hook() -> bool:
        calls.append(1)
        if len(calls) == 5:
            reactor.stop()
            reactor.call_soon(int)
        return True

    reactor.before_sleep(hook)
    reactor.run()
    reactor.remove_hook(hook)
    reactor.call_soon(reactor.stop)
    reactor.run()

    assert len(calls) == 5


def test_hook_that_stops_the_loop(reactor: Reactor) -> None:
    """If a hook stops the loop, the loop does not sleep first."""

    def hook() -> bool:
        reactor.stop()
        return False

    reactor.before_sleep(hook)
    reactor.run()


def test_idle_loop_sleeps() -> None:
    """An idle loop makes one pass for each reason to wake up and no others; a call from a thread is a reason."""
    reactor = Reactor()
    passes: list[int] = []

    def hook() -> bool:
        passes.append(1)
        return False

    reactor.before_sleep(hook)
    reactor.call_later(0.01, int)
    reactor.call_soon_threadsafe(int)
    reactor.call_later(0.05, reactor.stop)
    reactor.run()
    reactor.close()

    assert len(passes) <= 5


def test_bugs_go_to_their_handler(clock: Clock) -> None:
    """An exception from a callback or a thread is passed to `on_bug`, and everything else goes on."""
    bugs: list[str] = []
    reactor = Reactor(clock, on_bug=lambda error: bugs.append(str(error)))

    def bug() -> None:
        raise ValueError("a bug of ours")

    reactor.call_soon(bug)
    reactor.run_in_thread(bug, reactor.stop)
    reactor.run()
    reactor.close()

    assert bugs == ["a bug of ours", "a bug of ours"]


class Sleeper:
    """Something in flight for which the host does not let us wait at first."""

    in_flight = 1

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.delivered = 0

    def wait(self, timeout_s: float | None) -> bool:
        """Fail, or return as if having slept."""
        if self.failures:
            self.failures -= 1
            raise KernelError("wait for asynchronous I/O", errno.ENOMEM)
        return False

    def deliver(self) -> None:
        """Count the delivery."""
        self.delivered += 1


def test_bug_in_a_hook_goes_to_the_handler(clock: Clock) -> None:
    """An exception from a hook is contained like a callback's, and the hooks after it are called."""
    bugs: list[str] = []
    reactor = Reactor(clock, on_bug=lambda error: bugs.append(str(error)))

    def bug() -> bool:
        raise ValueError("a bug of ours")

    def stop() -> bool:
        reactor.stop()
        return True

    reactor.before_sleep(bug)
    reactor.before_sleep(stop)
    reactor.run()
    reactor.close()

    assert bugs == ["a bug of ours"]


def test_sleeper_that_cannot_wait_is_told_and_tried_again(clock: Clock) -> None:
    """While the common sleep fails, the loop serves its own descriptors and tries again."""
    bugs: list[Exception] = []
    reactor = Reactor(clock, on_bug=bugs.append)
    event = os.eventfd(1)
    sleeper = Sleeper(failures=2)
    seen: list[int] = []
    reactor.add(event, lambda: seen.append(os.eventfd_read(event)))
    reactor.before_sleep(lambda: bool(sleeper.delivered and reactor.stop()))
    reactor.sleep_by(sleeper)
    reactor.run()
    reactor.close()
    os.close(event)

    assert [KernelError] * 2 == [type(bug) for bug in bugs]
    assert seen == [1]
    assert sleeper.delivered


def test_bugs_without_a_handler_end_the_loop(reactor: Reactor) -> None:
    """Without `on_bug` an exception from a callback is raised by `run`."""

    def bug() -> None:
        raise ValueError("a bug of ours")

    reactor.call_soon(bug)
    with pytest.raises(ValueError, match="a bug of ours"):
        reactor.run()


def test_close_leaves_nothing_open() -> None:
    """A closed reactor leaves no descriptor and no thread behind."""
    before = open_descriptors(), threading.active_count()
    reactor = Reactor()
    reactor.run_in_thread(int, reactor.stop)
    reactor.run()
    reactor.close()

    assert (open_descriptors(), threading.active_count()) == before


def test_a_timer_counts_only_as_it_was_set_last() -> None:
    """Only the last setting of a timer counts, and it is called once; it may be set again when it was due."""
    now = [0.0]
    loop = Reactor(clock=lambda: now[0])
    seen: list[float] = []
    timer = loop.timer(lambda: seen.append(now[0]))

    def pass_until(time: float) -> None:
        now[0] = time
        loop.call_soon(loop.stop)
        loop.run()

    timer.set(5.0)
    timer.set(2.0)
    pass_until(1.0)
    assert seen == []
    pass_until(2.0)
    pass_until(6.0)
    assert seen == [2.0]
    timer.set(8.0)
    timer.set(9.0)
    pass_until(8.5)
    assert seen == [2.0]
    pass_until(9.0)
    assert seen == [2.0, 9.0]
    timer.set(10.0)
    timer.set(None)
    pass_until(11.0)
    assert seen == [2.0, 9.0]
    loop.close()


def test_a_descriptor_may_be_waited_for_until_it_can_be_written_to(reactor: Reactor) -> None:
    """With `writable` the callback is called once there is room, and not before."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    calls: list[int] = []
    reactor.add(writer, lambda: calls.append(1), writable=True)
    reactor.call_soon(reactor.stop)
    reactor.run()
    before = len(calls)
    os.read(reader, 1 << 20)
    reactor.call_soon(reactor.stop)
    reactor.run()
    reactor.remove(writer)
    os.close(reader)
    os.close(writer)

    assert (0, 1) == (before, len(calls))


def test_an_end_may_be_awaited_alone(reactor: Reactor) -> None:
    """`add_for_end` calls when the other end is closed, but not for data or a shutdown."""
    near, far = socket.socketpair()
    seen: list[bool] = []
    is_closed = False

    def end() -> None:
        seen.append(is_closed)
        reactor.remove(near.fileno())

    with near, far:
        reactor.add_for_end(near.fileno(), end)
        far.send(b"x")
        far.shutdown(socket.SHUT_WR)
        reactor.call_later(0, reactor.stop)
        reactor.run()
        far.close()
        is_closed = True
        reactor.call_later(0, reactor.stop)
        reactor.run()

    assert [True] == seen


def test_a_number_that_is_used_again_in_a_pass_is_not_ready(reactor: Reactor) -> None:
    """A descriptor that gets the number of a ready one, which was removed in the same pass, is not called for it."""
    first, second, third = os.eventfd(1), os.eventfd(1), os.eventfd(0)
    calls: list[str] = []

    def replace(other: int) -> None:
        calls.append("ready")
        reactor.remove(other)
        os.dup2(third, other)
        reactor.add(other, lambda: calls.append("not ready"))

    reactor.add(first, lambda: replace(second))
    reactor.add(second, lambda: replace(first))
    reactor.call_soon(reactor.stop)
    reactor.run()
    for event in (first, second):
        reactor.remove(event)
    for event in (first, second, third):
        os.close(event)

    assert ["ready"] == calls


def test_a_bug_that_somebody_contained_goes_the_same_way(clock: Clock) -> None:
    """A contained exception given to `bug` goes to `on_bug` like any other; without a handler it is raised."""
    bugs: list[Exception] = []
    reactor = Reactor(clock, on_bug=bugs.append)
    bug = ValueError("a bug of ours")
    reactor.bug(bug)
    reactor.close()
    reactor = Reactor(clock)
    with pytest.raises(ValueError, match="a bug of ours"):
        reactor.bug(bug)
    reactor.close()

    assert [bug] == bugs
