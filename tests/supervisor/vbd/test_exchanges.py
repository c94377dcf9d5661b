"""How an exchange of chains ends: what is in service then, and what `params` may still say."""

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
    """A disk that serves null:1G, and whose key `params` has not followed any exchange yet."""

    def __init__(self) -> None:
        self.events: list[Exchanged] = []
        self.closed: list[Any] = []  # orders in the ledger: number, code
        self.handover = Handover(Keeper({}), PATH)
        self.handover.descriptors("null:1G")
        self.was_noted: list[bool] = []  # the exchange, when its order was closed
        self.orders: Any = SimpleNamespace(under_way=[])
        self.exchanges = Exchanges(self.handover, self.orders, self, self.events.append)

    def close(self, number: int, answer: Answer) -> None:
        """Stand for the ledger."""
        self.closed.append((number, answer.code.value))
        self.was_noted.append(self.handover.notes.exchange is not None)

    def order(self, number: int, chain: str, params: str = "null:1G") -> None:
        """Note an exchange that is under way."""
        self.handover.note(exchange=Exchange(number, params, chain))

    def stand(self, chain: str) -> bool:
        """Let the worker report a chain, and return whether that is believed."""
        return self.exchanges.believes(Standing(1, Stage.SERVING, chain, read_only=False, shareable=False))


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk in service."""
    disk = Disk()
    serves(disk.handover, "null:1G")
    yield disk
    disk.handover.close()


def test_a_worker_that_dies_before_the_second_exchange_has_done_the_first_only(disk: Disk) -> None:
    """If a worker dies before a second exchange is made, only the first one counts as done, although `params` has not
    followed it yet.
    """
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
    """If an exchange keeps the text of the chain, for another file or size, the order number that the worker noted says
    whether it was done, and so which file has the guest's data.
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
    """An adopted worker's own report decides which chain is in service, and not its journal."""
    disk.order(7, "null:2G")
    serves(disk.handover, "null:2G", 7)
    disk.exchanges.conclude(Standing(1, Stage.SERVING, "null:1G", read_only=False, shareable=False))

    assert ("null:1G", [(7, "failed")]) == (disk.handover.notes.chain, disk.closed)


@pytest.mark.parametrize("has_written", [True, False])
def test_whatever_the_key_says_after_two_exchanges_it_follows_the_second(disk: Disk, *, has_written: bool) -> None:
    """After two exchanges `params` follows the second one, even if it is not known whether the first was ever written,
    because xenstore went away.
    """
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
    """The ledger closes the order before the note of the exchange is removed: a service that dies in between leaves an
    order that has ended.
    """
    disk.orders.under_way.append(SimpleNamespace(number=1))
    disk.order(1, "null:2G")
    disk.stand("null:2G")

    assert ([(1, "ok")], [True], None) == (disk.closed, disk.was_noted, disk.handover.notes.exchange)


def test_no_journal_tells_that_a_chain_took_its_own_place(disk: Disk) -> None:
    """If a worker dies over a resize, the order has failed, as nothing proves that it was done."""
    disk.order(1, "null:1G")
    disk.exchanges.settle()

    assert ([(1, "failed")], None, []) == (disk.closed, disk.handover.notes.exchange, disk.handover.notes.stale_params)


def test_an_exchange_that_the_journal_tells_of_is_done(disk: Disk) -> None:
    """If a worker has put the new chain in and died before it could report that, the exchange is done."""
    disk.order(1, "null:2G", "null:1G")
    serves(disk.handover, "null:2G")
    before = disk.handover.chain_in_service()
    disk.exchanges.settle()

    assert ("null:2G", "null:2G", [(1, "ok")]) == (before, disk.handover.notes.chain, disk.closed)
    assert [Exchanged(("null:1G",), "null:2G")] == disk.events


@pytest.mark.parametrize("is_exchanging", [True, False])
def test_a_chain_that_nobody_asked_for_is_not_believed(disk: Disk, *, is_exchanging: bool) -> None:
    """A worker's report of its chain is believed only if that chain was in service or was ordered; a false one changes
    nothing.
    """
    if is_exchanging:
        disk.order(1, "null:2G")
    noted = disk.handover.notes

    assert disk.stand("null:1G")
    assert not disk.stand("aio:/etc/hostname")
    assert (noted, [], []) == (disk.handover.notes, disk.events, disk.closed)
