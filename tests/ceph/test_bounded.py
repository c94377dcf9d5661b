"""Tests of `xenbackend.ceph.bounded`: calls that may never come back."""

from __future__ import annotations

import errno
import threading

import pytest

from xenbackend.ceph.bounded import Attempt, NotBack, within


def test_what_comes_back_in_time() -> None:
    """A result, even None, is returned, and an exception raised, where the call was made; nothing is undone."""
    undone = threading.Event()
    assert 7 == within(10, "", lambda: 7)
    assert Attempt(10, "").run(lambda: None, undone.set) is None
    with pytest.raises(ZeroDivisionError):
        Attempt(10, "").run(lambda: 1 / 0, undone.set)
    assert not undone.is_set()


@pytest.mark.parametrize("fails", [False, True])
def test_what_does_not_come_back_is_given_up_and_undone(*, fails: bool) -> None:
    """A call that takes too long raises an error with ETIMEDOUT; it goes on, and is undone once it has ended."""
    go_on, ended, undone = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        go_on.wait(10)
        ended.set()
        if fails:
            raise OSError

    def undo() -> None:
        assert ended.is_set()
        undone.set()

    with pytest.raises(NotBack, match="has not answered for 0 s: the image is not open") as caught:
        Attempt(0.01, "the image is not open").run(call, undo)
    assert errno.ETIMEDOUT == caught.value.errno
    assert not undone.is_set()
    go_on.set()
    assert undone.wait(10)


def test_what_was_given_up_does_nothing_that_others_see() -> None:
    """A call that was given up takes no further step: that raises in it, and it is undone."""
    go_on, undone = threading.Event(), threading.Event()
    steps: list[str] = []
    attempt = Attempt(0.01, "it")

    def call() -> None:
        with attempt.step():
            steps.append("first")
        go_on.wait(10)
        with attempt.step():
            steps.append("second")
        steps.append("behind it")

    with pytest.raises(NotBack):
        attempt.run(call, undone.set)
    go_on.set()
    assert undone.wait(10)
    assert ["first"] == steps


def test_a_step_is_not_given_up_in_its_middle() -> None:
    """If a call is given up during a step, the caller learns that once the step is over."""
    begun, go_on, end = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []
    attempt = Attempt(0.01, "it")

    def call() -> None:
        with attempt.step():
            begun.set()
            go_on.wait(10)
            order.append("step")
        end.wait(10)

    def wait() -> None:
        with pytest.raises(NotBack):
            attempt.run(call)
        order.append("given up")

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert begun.wait(10)
    waiter.join(0.1)
    go_on.set()
    waiter.join(10)
    end.set()
    assert ["step", "given up"] == order
