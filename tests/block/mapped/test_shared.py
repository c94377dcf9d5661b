"""Tests of `xenbackend.block.mapped.shared`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xenbackend.block.mapped.shared import Shared, Then


class Work:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.running: list[Then] = []
        self.soon: list[Callable[[], None]] = []
        self.ended: list[tuple[str, int]] = []
        self.shared = Shared(self.running.append, self.soon.append)

    def want(self, name: str) -> None:
        """Ask for the work."""
        self.shared.want(lambda status: self.ended.append((name, status)))

    def turn(self) -> None:
        """Let begin what wants to."""
        calls, self.soon[:] = self.soon[:], []
        for call in calls:
            call()


def test_those_of_one_turn_share_the_work() -> None:
    """Who asks before the work begins shares it; who asks while it is under way gets the next one, with its status."""
    work = Work()
    work.want("a")
    work.want("b")
    assert [] == work.running
    work.turn()
    work.want("c")
    work.want("d")
    work.turn()
    assert 1 == len(work.running)

    work.running.pop()(5)
    assert [("a", 5), ("b", 5)] == work.ended
    work.turn()
    work.running.pop()(0)
    work.turn()
    assert [("a", 5), ("b", 5), ("c", 0), ("d", 0)] == work.ended
    assert ([], [], True) == (work.running, work.soon, work.shared.is_idle)


def test_who_is_answered_may_ask_again() -> None:
    """From within an answer the work can be asked for once more, and begins once."""
    work = Work()
    work.shared.want(lambda _: partial(work.want, "again")())
    work.turn()
    work.running.pop()(0)
    work.turn()

    assert (1, []) == (len(work.running), work.ended)
    work.running.pop()(0)
    assert [("again", 0)] == work.ended
