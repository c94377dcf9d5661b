"""Watches that bring too many events, on a real store in a loop whose clock stands still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervisor.helpers import Clock, settle
from xenbackend.errors import StoreError
from xenbackend.loop.reactor import Reactor
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service import brake as module
from xenbackend.supervisor.service.brake import BURST, PAUSE_S, REFILL_S, Brake
from xenbackend.supervisor.xenstore.store import Store

LIFE = 6  # events of a frontend's whole life


class Braked:
    """A store with two watches, and what its brake lets through."""

    def __init__(self, xenstored: Xenstored) -> None:
        self.clock = Clock()
        self.loop = Reactor(self.clock)
        self.store = Store(xenstored.address)
        self.others = Store(xenstored.address)
        self.begun: list[str] = []  # the tokens of watches that are braked, in order
        self.brake = Brake(self.loop, self.store, frozenset({"exempt"}), self.begun.append)
        self.store.watch("/guest/state", "guest")
        self.store.watch("/other/state", "other")
        self.store.watch("/free", "exempt")
        self.look()

    def write(self, path: str, times: int) -> None:
        """Write a node so many times."""
        for number in range(times):
            self.others.write(path, str(number))

    def look(self, seconds: float = 0.0) -> list[tuple[str, str]]:
        """Return the events that are let through after so much time."""
        self.clock.time += seconds
        settle(self.loop)
        self.store.own_domid()  # its answer comes after the events of earlier writes
        found = self.store.events()
        self.brake.look()
        return found

    def flood(self, path: str = "/guest/state") -> None:
        """Write more often than the brake lets through, and look."""
        self.write(path, BURST)
        self.look()

    def close(self) -> None:
        """Close everything."""
        self.brake.close()
        self.store.close()
        self.others.close()
        self.loop.close()


@pytest.fixture
def braked(xenstored: Xenstored) -> Iterator[Braked]:
    """A store whose watches have fired."""
    braked = Braked(xenstored)
    yield braked
    braked.close()


def test_a_flood_costs_nothing_for_a_while_and_its_end_is_seen(braked: Braked) -> None:
    """R11: a watch that brings too many events is removed for a while, and brings none. It fires when it is set again,
    so that what happened meanwhile is seen.
    """
    braked.flood()
    braked.write("/guest/state/below", 1000)
    meanwhile = braked.look()
    again = braked.look(PAUSE_S[0])
    braked.write("/guest/state", 1)

    assert [] == meanwhile
    assert [("/guest/state", "guest")] == again == braked.look()


def test_many_are_asked_for_at_once(braked: Braked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because a flooded xenstored answers slowly, requests to remove or set sixteen watches are sent before the first
    answer is awaited.
    """
    for number in range(64):
        braked.store.watch(f"/many/{number}", str(number))
    braked.look()
    for number in range(64):
        braked.write(f"/many/{number}", BURST)
    steps: list[str] = []
    for name in ("_send", "_take_reply"):
        step = getattr(braked.store, name)
        monkeypatch.setattr(
            braked.store, name, lambda *args, step=step, name=name: (steps.append(name), step(*args))[1]
        )
    braked.brake._store.events()
    while len(braked.begun) < 64:
        braked.store.events()
        braked.brake.look()
    taken_back, steps[:] = len(steps), []
    braked.look(PAUSE_S[0])

    assert 2 * 64 == taken_back
    assert (["_send"] * 16 + ["_take_reply"] * 16) * 4 == steps[:128]


def test_nobody_else_notices(braked: Braked) -> None:
    """Events of other watches still arrive; watches that no guest can make fire are never braked, however many events
    they bring.
    """
    braked.flood()
    braked.flood("/free/a")
    braked.write("/other/state", 1)
    braked.write("/free/b", 1)

    assert [("/other/state", "other"), ("/free/b", "exempt")] == braked.look()


def test_a_frontend_that_comes_and_goes_is_not_braked(braked: Braked) -> None:
    """A frontend may live and end ten times at once, and once every two seconds after that, and each of its events is
    seen.
    """
    for _ in range(10 * LIFE):
        braked.write("/guest/state", 1)
        assert [("/guest/state", "guest")] == braked.look()
    braked.clock.time += REFILL_S * BURST
    for _ in range(300):
        braked.write("/guest/state", LIFE)
        assert [("/guest/state", "guest")] == braked.look(2.0)


def test_who_does_not_stop_is_looked_at_less_and_less(braked: Braked) -> None:
    """If a watch goes on to bring too many events, the pauses grow up to a limit. After a long calm they begin again
    with the shortest.
    """
    lengths = []
    for _ in range(6):
        braked.flood()
        begun = braked.clock.time
        while not braked.look(0.5):
            pass
        lengths.append(braked.clock.time - begun)
    braked.look(REFILL_S * BURST)
    braked.flood()

    assert [1.0, 2.0, 4.0, 8.0, 8.0, 8.0] == lengths
    assert [("/guest/state", "guest")] == braked.look(PAUSE_S[0])


def test_that_a_watch_is_braked_is_told_once_until_it_is_calm_again(braked: Braked) -> None:
    """That a watch is braked is reported once, until it is calm again. `pause_s` returns its latest pause, also between
    pauses, and 0 for other watches.
    """
    found = [braked.brake.pause_s("guest")]
    for _ in range(6):
        braked.flood()
        found.append(braked.brake.pause_s("guest"))
        while not braked.look(0.5):
            pass
        found.append(braked.brake.pause_s("guest"))
    begun = list(braked.begun)
    braked.look(REFILL_S * BURST)
    calm = braked.brake.pause_s("guest")
    braked.flood()

    assert [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, *[8.0] * 6] == found
    assert (["guest"], 0.0, ["guest"] * 2) == (begun, calm, braked.begun)
    assert 0.0 == braked.brake.pause_s("other") == braked.brake.pause_s("none")


def test_another_vbd_of_that_name_begins_anew(braked: Braked) -> None:
    """Events that a former vbd of the same name caused are not counted against the new one."""
    braked.write("/guest/state", BURST - 2)  # it fired when it was set, too
    braked.look()
    braked.brake.forget("guest")
    braked.write("/guest/state", 2)
    braked.look()
    braked.write("/guest/state", 1)

    assert [("/guest/state", "guest")] == braked.look()


def test_a_watch_is_set_again_though_xenstore_was_away(braked: Braked, xenstored: Xenstored) -> None:
    """A watch that falls due while there is no connection is set again on reconnection; one that is not due yet is set
    when it is due.
    """
    braked.flood()
    braked.flood("/other/state")
    xenstored.stop()
    with pytest.raises(StoreError):
        braked.look()
    braked.brake._due["other"] += 1
    braked.clock.time += PAUSE_S[0]
    settle(braked.loop)
    xenstored.start()
    braked.store.reconnect()

    assert [("/guest/state", "guest"), ("/free", "exempt")] == braked.look()
    assert [("/other/state", "other")] == braked.look(1)


@pytest.mark.rows("R12", "C1")
def test_calm_watches_are_forgotten(braked: Braked, monkeypatch: pytest.MonkeyPatch) -> None:
    """R12: the memory that the brake needs does not grow with the number of guests that there have been."""
    monkeypatch.setattr(module, "_MOST", 10)
    braked.brake._most = 10
    for number in range(100):
        braked.store.watch(f"/{number}", str(number))
        braked.look(60.0)
        braked.store.unwatch(f"/{number}", str(number))

    assert len(braked.brake._paces) <= 11
