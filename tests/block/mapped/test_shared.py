"""Tests of `xenbackend.block.mapped.shared`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xenbackend.block.mapped.shared import Once, Shared, SharedByNumber, Then


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
        """Start the work that was asked for."""
        calls, self.soon[:] = self.soon[:], []
        for call in calls:
            call()


def test_those_of_one_turn_share_the_work() -> None:
    """All who ask before the work begins share it. Those who ask while it runs share the next run, with its status."""
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
    """A callback can ask for the work again, which then begins once."""
    work = Work()
    work.shared.want(lambda _: partial(work.want, "again")())
    work.turn()
    work.running.pop()(0)
    work.turn()

    assert (1, []) == (len(work.running), work.ended)
    work.running.pop()(0)
    assert [("again", 0)] == work.ended


def test_work_with_numbers_is_shared_by_number() -> None:
    """The work for each number begins once for all who want it, and never runs twice at a time for one number."""
    begun: list[tuple[int, Then]] = []
    calls: list[Callable[[], None]] = []
    works = SharedByNumber(lambda number, then: begun.append((number, then)), calls.append)
    heard: list[str] = []

    def again(status: int) -> None:
        heard.append(f"first {status}")
        works.want(7, lambda status: heard.append(f"again {status}"))

    works.want(7, again)
    works.want(7, lambda status: heard.append(f"second {status}"))
    works.want(8, lambda status: heard.append(f"other {status}"))
    for call in calls[:]:
        call()
    assert [7, 8] == [number for number, _ in begun]
    begun[0][1](0)
    for call in calls[2:]:
        call()
    assert [7, 8, 7] == [number for number, _ in begun]
    works.want(7, lambda status: heard.append(f"last {status}"))  # the work that `again` asked for is under way
    for call in calls[3:]:
        call()
    assert [7, 8, 7] == [number for number, _ in begun]
    begun[2][1](5)
    begun[1][1](0)
    calls[-1]()
    works.forget(7)  # somebody waits for it
    begun[3][1](0)
    assert [7, 8] == sorted(works._works)
    works.forget(7)

    assert ["first 0", "second 0", "again 5", "other 0", "last 0"] == heard
    assert [8] == list(works._works)


def test_what_is_got_once_is_for_all_who_wait() -> None:
    """The first caller starts the work and the others wait. All get its result, and the next caller starts it anew."""
    begun: list[Callable[..., None]] = []
    heard: list[tuple[str, int, bytes]] = []
    once: Once[str] = Once(lambda who, status, data: heard.append((who, status, data)))

    for who in ("a", "b"):
        once.want(3, who, begun.append)
    once.want(4, "c", begun.append)
    begun[1](5, b"")
    begun[0](0, b"x")
    once.want(3, "d", lambda then: then(0, b"at once"))

    assert [("c", 5, b""), ("a", 0, b"x"), ("b", 0, b"x"), ("d", 0, b"at once")] == heard
    assert 2 == len(begun)
