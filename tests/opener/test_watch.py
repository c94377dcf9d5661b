"""Tests of `xenbackend.opener.watch`."""

from __future__ import annotations

import threading
from queue import Queue

from xenbackend.opener.watch import Watch

PATIENCE_S = 20.0  # for a thread of the watch


def test_a_step_that_does_not_come_back_is_told_of_and_so_is_its_end() -> None:
    """The name of a step that lasts is reported once, and an empty name when the step is over."""
    said: Queue[str] = Queue()
    watch = Watch(said.put, patience_s=0.01)
    for name in ("/a", "/b"):
        with watch.over(name):
            assert name == said.get(timeout=PATIENCE_S)
        assert "" == said.get(timeout=PATIENCE_S)

    watch.close()
    assert said.empty()


def test_who_looks_ends() -> None:
    """After `close` no thread of a watch is left, whether it has reported anything or not."""
    others = set(threading.enumerate())
    watches = [Watch(lambda _: None, patience_s=PATIENCE_S) for _ in range(5)]
    threads = set(threading.enumerate()) - others
    assert 5 == len(threads)
    with watches[0].over("/a"):
        for each in watches:
            each.close()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_step_that_comes_back_is_nobodys_business() -> None:
    """Short steps are not reported, however many there are."""
    said: Queue[str] = Queue()
    watch = Watch(said.put, patience_s=PATIENCE_S)
    for _ in range(100):
        with watch.over("/a"):
            pass

    watch.close()
    assert said.empty()
