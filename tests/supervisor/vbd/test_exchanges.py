"""How an exchange of chains ends: what is in service afterwards, and what `params` may still say."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.supervisor.helpers import PATH
from tests.supervisor.vbd.test_handover import serves
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.messages import Stage, Standing
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd.events import Exchanged
from xenbackend.supervisor.vbd.exchanges import Exchanges
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.notes import Exchange


class Disk:
    """One that serves null:1G, whose key params no exchange has followed yet."""

    def __init__(self) -> None:
        self.events: list[Exchanged] = []
        self.closed: list[Any] = []  # orders in the ledger: number, code
        self.handover = Handover(Keeper({}), PATH)
        self.handover.descriptors("null:1G")
        self.was_noted: list[bool] = []  # the exchange, when its order was closed
        self.orders: Any = SimpleNamespace(under_way=[])
        self.exchanges = Exchanges(self.handover, self.orders, self, self.events.append)  # type: ignore[arg-type]

    def close(self, number: int, answer: Answer) -> None:
        """Be the ledger."""
        self.closed.append((number, answer.code.value))
        self.was_noted.append(self.handover.notes.exchange is not None)

    def order(self, number: int, chain: str, params: str = "null:1G") -> None:
        """Have an exchange under way."""
        self.handover.note(exchange=Exchange(number, params, chain))

    def stand(self, chain: str) -> bool:
        """Let the worker say what it serves, and return whether that is believed."""
        return self.exchanges.believes(Standing(1, Stage.SERVING, chain, read_only=False, shareable=False))


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk in service."""
    disk = Disk()
    serves(disk.handover, "null:1G")
    yield disk
    disk.handover.close()


def test_a_worker_that_dies_before_the_second_exchange_has_done_the_first_only(disk: Disk) -> None:
    """While params have not followed the first one it is still known; the second is not taken for done over that."""
    disk.order(1, "null:2G")
    assert disk.stand("null:2G")
    serves(disk.handover, "null:2G")
    disk.order(2, "null:3G")
    disk.exchanges.settle()

    assert ("null:2G", "null:2G") == (disk.handover.chain_in_service(), disk.handover.notes.chain)
    assert (None, [(1, "ok"), (2, "failed")]) == (disk.handover.notes.exchange, disk.closed)
    assert {"null:2G"} == {each.chain for each in disk.events}


@pytest.mark.parametrize(("noted", "is_done"), [(0, False), (6, False), (7, True)])
@pytest.mark.parametrize("who", ["a dead worker", "an earlier service"])
def test_the_same_chain_once_more_is_known_by_its_order(disk: Disk, who: str, noted: int, *, is_done: bool) -> None:
    """Where the text stays, for another file or another size, the order that the worker noted says whether it was done:
    which file has the guest's data hangs on that.
    """
    disk.order(7, "null:1G")
    serves(disk.handover, "null:1G", noted)
    if who == "a dead worker":
        assert is_done == disk.exchanges.settle()
    else:
        disk.exchanges.conclude(Standing(1, Stage.SERVING, "null:1G", read_only=False, shareable=False))

    assert [(7, "ok" if is_done else "failed")] == disk.closed
    assert (None, 7 if is_done else 0) == (disk.handover.notes.exchange, disk.handover.notes.exchanged_by)


def test_a_worker_is_adopted_with_the_chain_that_it_stands_with(disk: Disk) -> None:
    """What its journal says of a chain that it does not serve counts for nothing while it is there to be asked."""
    disk.order(7, "null:2G")
    serves(disk.handover, "null:2G", 7)
    disk.exchanges.conclude(Standing(1, Stage.SERVING, "null:1G", read_only=False, shareable=False))

    assert ("null:1G", [(7, "failed")]) == (disk.handover.notes.chain, disk.closed)


@pytest.mark.parametrize("has_written", [True, False])
def test_whatever_the_key_says_after_two_exchanges_it_follows_the_second(disk: Disk, *, has_written: bool) -> None:
    """Whether the first one's text came into the key may be unknown: xenstore went away over it."""
    disk.order(1, "null:2G")
    disk.stand("null:2G")
    disk.order(2, "null:3G")
    disk.stand("null:3G")
    disk.handover.saw_params("null:2G" if has_written else "null:1G")
    disk.exchanges.settle()  # as the next service does

    assert "null:3G" == disk.events[-1].chain
    assert {"null:1G", "null:2G"} <= set(disk.events[-1].stale_params)
    disk.handover.saw_params("null:3G")
    assert [] == disk.handover.notes.stale_params


def test_that_an_exchange_is_done_is_in_the_ledger_before_nobody_knows_of_it_any_more(disk: Disk) -> None:
    """A service that dies in between leaves an order that is ended, and not one that nobody seems to have done."""
    disk.orders.under_way.append(SimpleNamespace(number=1))
    disk.order(1, "null:2G")
    disk.stand("null:2G")

    assert ([(1, "ok")], [True], None) == (disk.closed, disk.was_noted, disk.handover.notes.exchange)


def test_no_journal_tells_that_a_chain_took_its_own_place(disk: Disk) -> None:
    """A worker that dies over a resize has not done it, for all that anybody knows."""
    disk.order(1, "null:1G")
    disk.exchanges.settle()

    assert ([(1, "failed")], None, []) == (disk.closed, disk.handover.notes.exchange, disk.handover.notes.stale_params)


def test_an_exchange_that_the_journal_tells_of_is_done(disk: Disk) -> None:
    """The worker put the chain in, and died before it could say so."""
    disk.order(1, "null:2G", "null:1G")
    serves(disk.handover, "null:2G")
    before = disk.handover.chain_in_service()
    disk.exchanges.settle()

    assert ("null:2G", "null:2G", [(1, "ok")]) == (before, disk.handover.notes.chain, disk.closed)
    assert [Exchanged(("null:1G",), "null:2G")] == disk.events


@pytest.mark.parametrize("is_exchanging", [True, False])
def test_a_chain_that_nobody_asked_for_is_not_believed(disk: Disk, *, is_exchanging: bool) -> None:
    """What a worker says is in service is so if it was, or was to be put in; its lie alters nothing."""
    if is_exchanging:
        disk.order(1, "null:2G")
    noted = disk.handover.notes

    assert disk.stand("null:1G")
    assert not disk.stand("aio:/etc/hostname")
    assert (noted, [], []) == (disk.handover.notes, disk.events, disk.closed)
