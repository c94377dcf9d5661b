"""Limits that several disks share, with workers whose figures the test sets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from tests.supervisor.helpers import Clock
from xenbackend import counters
from xenbackend.block import drivers
from xenbackend.block.driver import Filter
from xenbackend.block.options import option
from xenbackend.block.shares import FIRST
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Command, Reply
from xenbackend.supervisor.service.sharing import TICK_S, Sharing
from xenbackend.supervisor.xenstore.paths import VbdPath

NAMES = ["waiting", "held", "held_ms", "spent_ms", "share_ppm"]


@dataclass
class Disk:
    """A disk as `Sharing` sees it. `says` are its figures. It accepts each share unless `replies` is false."""

    number: int
    chain: str = "log:|throttle:iops=100,group=g|null:1G"
    says: dict[str, int] = field(default_factory=lambda: {"share_ppm": round(1e6 * FIRST)})
    replies: bool = True
    told: list[float] = field(default_factory=list)
    page: memoryview | None = field(default_factory=lambda: memoryview(bytearray(counters.SIZE)))

    def __post_init__(self) -> None:
        self.path = VbdPath("vbd", 0, self.number, 51712)
        self.link = SimpleNamespace(ask=self._ask)
        self.device = SimpleNamespace(
            layers=[SimpleNamespace(figures=[]), SimpleNamespace(figures=NAMES), SimpleNamespace(figures=[])]
        )

    def chain_in_service(self) -> str:
        """See `Vbd`."""
        return self.chain

    def counters_page(self) -> memoryview | None:
        """See `Vbd`."""
        if self.page is not None:
            words = self.page.cast("Q")
            for place, name in enumerate(NAMES):
                words[counters.FIGURES + place] = self.says.get(name, 0)
        return self.page

    def _ask(self, question: Command, then: Callable[[Reply], None]) -> None:
        assert ("1", "share") == (question.layer, question.verb)
        self.told.append(float(question.arguments[0]))
        if self.replies:
            self.says["share_ppm"] = round(1e6 * self.told[-1])
            then(Reply(0, Code.OK))

    def is_held(self, *, is_held: bool = True) -> None:
        """Count as held back, or not, since the last look."""
        self.says["held"] = self.says.get("held", 0) + is_held


class Group:
    """Some disks, and the object that divides a limit among them."""

    def __init__(self, *disks: Disk) -> None:
        self.disks: dict[VbdPath, Any] = {each.path: each for each in disks}
        self.sharing = Sharing(Reactor(Clock()), self.disks)

    def look(self, times: int = 4, *, held: tuple[Disk, ...] = ()) -> None:
        """Let some ticks pass, in each of which the disks in `held` are held back."""
        for _ in range(times):
            for each in held:
                each.is_held()
            self.sharing.look()


def share(disk: Disk) -> float:
    """Return the share that a disk uses."""
    return disk.says["share_ppm"] / 1e6


def test_who_is_held_back_gets_what_the_others_do_not_use() -> None:
    """Two disks that want as much as they can get have equal shares. While one of them is idle, the other gets nearly
    all; then the shares become equal again.
    """
    one, two = Disk(5), Disk(6)
    group = Group(one, two)
    group.look(held=(one, two))
    assert [0.5, 0.5] == [share(one), share(two)]
    group.look(held=(one,))
    assert (share(one) > 0.9, share(two) > 0) == (True, True)
    assert share(one) + share(two) <= 1.0 + 1e-6
    group.look(held=(one, two))
    assert pytest.approx([0.5, 0.5]) == [share(one), share(two)]


def test_who_uses_some_keeps_that() -> None:
    """A disk that uses a fifth of the limit and is never held back keeps that if another one wants more."""
    one, two = Disk(5), Disk(6)
    group = Group(one, two)
    for _ in range(6):
        two.says["spent_ms"] = two.says.get("spent_ms", 0) + round(200 * TICK_S)
        group.look(1, held=(one,))

    assert pytest.approx(0.25) == share(two)
    assert pytest.approx(0.75) == share(one)


@pytest.mark.parametrize(
    "lies", [{"waiting": 2**64 - 1, "spent_ms": 2**64 - 1, "held": 2**64 - 1, "share_ppm": 2**64 - 1}, {"share_ppm": 0}]
)
def test_a_worker_that_lies_harms_only_itself(lies: dict[str, int]) -> None:
    """Whatever figures a worker reports, the other disks get their fair shares; and it is not sent a share again before
    it has replied.
    """
    liar, *others = (Disk(number) for number in range(5, 9))
    liar.replies = False
    group = Group(liar, *others)
    for _ in range(8):
        liar.says.update(lies)
        group.look(1, held=tuple(others))

    assert all(share(each) >= 0.25 - 1e-6 for each in others)
    assert len(liar.told) == 1


def test_a_worker_that_does_not_reply_is_asked_again_when_it_does() -> None:
    """A worker that does not reply is sent nothing more. Once it replies, it is sent the share that it should have by
    then.
    """
    one, two = Disk(5, replies=False), Disk(6)
    group = Group(one, two)
    replies: list[Callable[[Reply], None]] = []
    one.link = SimpleNamespace(
        ask=lambda question, then: (one.told.append(float(question.arguments[0])), replies.append(then))
    )
    group.look(10, held=(one, two))
    assert len(one.told) == 1
    replies.pop()(Reply(0, Code.GONE))
    group.look(1, held=(one, two))

    assert pytest.approx(0.5) == one.told[-1]


def test_groups_do_not_know_each_other() -> None:
    """Groups with different names share nothing. A chain without a group, or one that cannot be parsed, belongs to
    none.
    """
    one, two = Disk(5), Disk(6, "log:|throttle:iops=100,group=other|null:1G")
    rest = [Disk(7, "log:|throttle:iops=5|null:1G"), Disk(8, "nobody:"), Disk(9, "")]
    group = Group(one, two, *rest)
    group.look(held=(one, two))

    assert [1.0, 1.0] == [share(one), share(two)]
    assert [[], [], []] == [each.told for each in rest]


def test_only_the_throttle_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `throttle:` is sent a share: an option `group` of a third party's driver may mean something else."""

    class Stranger(Filter):
        name = "stranger"

        @dataclass(frozen=True, slots=True)
        class Options:
            group: str = option("another thing", default="")

    monkeypatch.setitem(drivers.BUILT_IN, "stranger", f"{__name__}:Stranger")
    monkeypatch.setattr(sys.modules[__name__], "Stranger", Stranger, raising=False)
    stranger, one = Disk(5, "log:|stranger:group=g|null:1G"), Disk(6)
    group = Group(stranger, one)
    group.look(held=(stranger, one))

    assert ([], 1.0) == (stranger.told, share(one))


def test_who_has_gone_leaves_his_share() -> None:
    """The others get the share of a disk that is gone, or has no worker. The next worker of the disk starts with its
    former share, and is counted again.
    """
    one, two = Disk(5), Disk(6)
    group = Group(one, two)
    group.look(held=(one, two))
    two.page = None
    group.look(held=(one,))
    assert pytest.approx(1.0) == share(one)
    two.page = memoryview(bytearray(counters.SIZE))
    group.look(6, held=(one, two))
    assert pytest.approx([0.5, 0.5]) == [share(one), share(two)]
    del group.disks[two.path]
    group.look(held=(one,))
    assert pytest.approx(1.0) == share(one)


def test_another_disk_in_the_same_place_begins_anew() -> None:
    """A disk that was detached and attached again within a second has a new worker, which is sent its share."""
    one = Disk(5)
    group = Group(one)
    group.look(held=(one,))
    other = Disk(5)
    group.disks[other.path] = other
    group.look(held=(other,))

    assert (1.0, 1.0) == (share(other), other.told[-1])
