"""Tests of `xenbackend.ceph.bounded`: calls that may never come back."""

from __future__ import annotations

import errno
import threading

import pytest

from xenbackend.ceph.bounded import NotBack, within


def test_what_comes_back_in_time() -> None:
    """A result is returned, also None, and an exception is raised where the call was made."""
    assert 7 == within(10, "", lambda: 7)
    assert within(10, "", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(10, "", lambda: 1 / 0)


def test_what_does_not_come_back_is_given_up() -> None:
    """A call that takes too long is a sentence with ETIMEDOUT, and goes on by itself."""
    go_on, ended = threading.Event(), threading.Event()

    def call() -> None:
        go_on.wait()
        ended.set()

    with pytest.raises(NotBack, match="has not answered for 0 s: the image is not open") as caught:
        within(0.01, "the image is not open", call)
    assert errno.ETIMEDOUT == caught.value.errno
    go_on.set()
    assert ended.wait(10)
