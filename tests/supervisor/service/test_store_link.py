"""The connection to xenstore in a loop whose clock stands still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervisor.helpers import Clock, settle
from xenbackend.errors import StoreError
from xenbackend.loop.reactor import Reactor
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.store_link import StoreLink
from xenbackend.supervisor.xenstore.store import Store


class Linked:
    """A store in a loop, and the calls that its link has made."""

    def __init__(self, address: str) -> None:
        self.clock = Clock()
        self.loop = Reactor(self.clock)
        self.store = Store(address)
        self.seen: list[list[tuple[str, str]]] = []
        self.backs = 0
        self.work = False
        self.problem: StoreError | None = None
        self.link = StoreLink(
            self.store, self.loop, follow=self._follow, has_work=lambda: self.work, on_back=self._come_back
        )

    def _follow(self) -> None:
        self.work = False
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem
        self.seen.append(self.store.events())

    def _come_back(self) -> None:
        self.backs += 1

    def settle(self, seconds: float = 0.0) -> None:
        """Let some time pass, and do what is due."""
        self.clock.time += seconds
        settle(self.loop)

    def close(self) -> None:
        """Close everything."""
        self.link.close()
        self.store.close()
        self.loop.close()


@pytest.fixture
def linked(xenstored: Xenstored) -> Iterator[Linked]:
    """A store in a loop."""
    linked = Linked(xenstored.address)
    yield linked
    linked.close()


def test_events_that_came_with_an_answer_are_seen(linked: Linked, toolstack: Store) -> None:
    """Events that arrived together with an answer are handled before the loop sleeps. Without events or work, nothing
    is called.
    """
    linked.store.watch("/a", "token")
    toolstack.write("/a", "1")
    linked.store.read("domid")  # its answer comes after the event
    linked.settle()
    seen = [each for each in linked.seen if each]
    linked.seen.clear()
    linked.settle()
    linked.work = True
    linked.settle()

    assert [[("/a", "token")]] == seen
    assert [[]] == linked.seen


def test_an_event_wakes_the_loop(linked: Linked, toolstack: Store) -> None:
    """An event that comes while nothing is being asked wakes the loop."""
    linked.store.watch("/a", "token")
    linked.settle()
    toolstack.write("/a", "1")
    linked.loop.before_sleep(lambda: bool(("/a", "token") in linked.seen[-1] and linked.loop.stop()))
    linked.loop.run()

    assert [("/a", "token")] == linked.seen[-1]


@pytest.mark.parametrize("how", ["somebody asks", "nobody asks", "it refuses something"])
def test_a_lost_connection_is_made_anew(linked: Linked, xenstored: Xenstored, toolstack: Store, how: str) -> None:
    """However the loss is noticed, the connection is made again; tries become rarer, up to some seconds, and nothing
    else is done meanwhile.
    """
    linked.store.watch("/a", "token")
    linked.settle()
    xenstored.stop()
    if how == "it refuses something":
        xenstored.start()
        linked.problem, linked.work = StoreError("xenstore: read /a: Quota exceeded"), True
    elif how == "somebody asks":
        with pytest.raises(StoreError):
            linked.store.read("/a")
    linked.settle()
    assert not linked.store.is_connected
    linked.seen.clear()
    linked.work = True
    tried: list[float] = []
    former = linked.store.reconnect

    def note() -> None:
        tried.append(round(linked.clock.time - 100, 3))
        former()

    linked.store.reconnect = note
    if how == "it refuses something":
        linked.settle(0.1)
        assert ([0.1], 1) == (tried, linked.backs)
        return
    for _ in range(200):
        linked.settle(0.1)
    assert pytest.approx([0.1, 0.3, 0.7, 1.5, 3.1, 6.3, 11.3, 16.3], abs=0.75) == tried
    assert [] == linked.seen
    xenstored.start()
    linked.settle(5)
    linked.settle()

    assert (1, [("/a", "token")]) == (linked.backs, [event for each in linked.seen for event in each])


@pytest.mark.usefixtures("descriptors")
def test_nothing_is_left_of_it(xenstored: Xenstored) -> None:
    """After a link is closed, even while it waits for xenstore, it calls nothing any more."""
    linked = Linked(xenstored.address)
    linked.problem, linked.work = StoreError("no"), True
    linked.settle()
    linked.link.close()
    linked.settle(10)
    assert 0 == linked.backs
    linked.store.close()
    linked.loop.close()
