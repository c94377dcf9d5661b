"""The last thousand orders: what is remembered, also beyond the end of a service, and what is logged."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import Kept
from xenbackend import log
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.ledger import KEPT, ORDERS, RECORD, Ledger

WHO = {"uid": 0, "pid": 12, "command": "xenbackend"}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """A keeper of descriptors for the next service."""
    keeper = Kept(tmp_path)
    yield keeper
    keeper.close()


def test_an_order_is_under_way_until_it_ends() -> None:
    """The ledger knows from the beginning of an order who gave it, and at its end also how and when it ended, and what
    it led to.
    """
    now = [100.0]
    ledger = Ledger(Keeper({}), lambda: now[0])
    number = ledger.open("snapshot", "5/xvda", WHO, {"from": "aio:/a", "token": "5f"})
    before = ledger.entries()
    now[0] = 102.5
    ledger.close(number, Answer(Code.OK, {"chain": "qcow2:/b|aio:/a"}))

    begun = {"number": 1, "verb": "snapshot", "vbd": "5/xvda", "who": WHO, "from": "aio:/a", "to": "", "began": 100.0,
             "ended": None, "code": "under-way", "error": "", "token": "5f"}  # fmt: skip
    assert 1 == number
    assert [begun] == before
    assert [{**begun, "to": "qcow2:/b|aio:/a", "ended": 102.5, "code": "ok"}] == ledger.entries()
    ledger.leave()


def test_an_order_ends_once() -> None:
    """To end an order a second time, or one that is not known, changes nothing."""
    ledger = Ledger(Keeper({}))
    number = ledger.open("pause", "5/xvda", WHO, {})
    ledger.close(number, Answer(Code.FAILED, sentence="no"))
    ended = ledger.entries()
    for other in (number, number + 1, 0, -1, ORDERS + number):
        ledger.close(other, Answer(Code.OK))

    assert ended == ledger.entries()
    assert [None, None] == [ledger.entry(0), ledger.entry(ORDERS + number)]
    ledger.leave()


def test_the_last_thousand_are_known() -> None:
    """The last thousand orders are known, in order; older ones are forgotten one by one."""
    ledger = Ledger(Keeper({}))
    for _ in range(ORDERS + 7):
        ledger.close(ledger.open("pause", "5/xvda", WHO, {}), Answer(Code.OK))

    assert list(range(8, ORDERS + 8)) == [each["number"] for each in ledger.entries()]
    assert {"ok"} == {each["code"] for each in ledger.entries()}
    ledger.leave()


def test_orders_outlive_the_service(kept: Kept) -> None:
    """The next service knows the orders, can end those under way, and continues their numbers; so does the one after
    it.
    """
    first = Ledger(kept.keeper())
    done, open_one = (first.open(verb, "5/xvda", WHO, {}) for verb in ("pause", "set"))
    first.close(done, Answer(Code.OK))
    first.leave()
    second = Ledger(kept.keeper())
    found = second.entries()
    second.close(open_one, Answer(Code.FAILED, sentence="the worker was killed"))
    number = second.open("resume", "5/xvda", WHO, {})
    second.leave()
    third = Ledger(kept.keeper())

    assert ["ok", "under-way"] == [each["code"] for each in found]
    assert 3 == number
    assert ["ok", "failed", "under-way"] == [each["code"] for each in third.entries()]
    third.leave()


def test_a_stop_forgets_them(kept: Kept) -> None:
    """After a stop nothing is kept, and the numbers begin anew."""
    ledger = Ledger(kept.keeper())
    ledger.open("stop", "", WHO, {})
    before = set(kept.fds)
    ledger.forget()

    assert ({KEPT}, set()) == (before, set(kept.fds))
    following = Ledger(kept.keeper())
    assert [] == following.entries()
    following.leave()


def test_a_memory_that_is_none_of_ours_is_let_go(kept: Kept) -> None:
    """A memory that could be cut short, or that has another size, is closed and not mapped: to touch it could kill the
    service.
    """
    fd = os.memfd_create("orders")
    keeper = kept.keeper()
    keeper.inherited[KEPT] = fd
    ledger = Ledger(keeper)

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert [] == ledger.entries()
    ledger.leave()


@pytest.mark.parametrize("letter", ["x", "\udcff", "\x00", "ü"])
def test_what_is_too_long_is_cut(letter: str) -> None:
    """Chains, sentences and names of any length and content are cut to fit into one record, which can still be read."""
    ledger = Ledger(Keeper({}))
    number = ledger.open(
        "set", "5/xvda", {**WHO, "command": letter * 300}, {"from": letter * 3000, "to": letter * 5000}
    )
    ledger.close(number, Answer(Code.FAILED, sentence=letter * 9000))
    (entry,) = ledger.entries()

    assert (number, "set", "5/xvda", "failed") == tuple(entry[key] for key in ("number", "verb", "vbd", "code"))
    assert len(json.dumps(entry)) <= RECORD
    ledger.leave()


class Killed(Exception):
    """The service's end."""


class Words:
    """The words of a memory; a store to one of them stands for the service's death right before it."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def __getitem__(self, place: int) -> int:
        return int(self._words[place])

    def __setitem__(self, place: int, word: int) -> None:
        raise Killed


def test_a_kill_while_it_is_written_leaves_what_was(kept: Kept) -> None:
    """A record is written in full before the one store that makes it valid. A service killed before that store leaves
    the former record.
    """
    ledger = Ledger(kept.keeper())
    ledger.close(ledger.open("set", "5/xvda", WHO, {"to": "a" * 400}), Answer(Code.FAILED, sentence="no"))
    number = ledger.open("set", "5/xvda", WHO, {"to": "b" * 400})
    before = ledger.entries()
    ledger._words = Words(ledger._words)
    for act in (
        lambda: ledger.close(number, Answer(Code.OK, {"chain": "c" * 500})),
        lambda: ledger.open("set", "6/xvda", WHO, {"to": "d" * 500}),
    ):
        with pytest.raises(Killed):
            act()
    following = Ledger(kept.keeper())

    assert before == following.entries()
    following.leave()


def test_each_order_is_one_line_of_the_log() -> None:
    """An order is logged in one line when it ends: who gave it, the disk, the chain before and after, how it ended, and
    how long it took.
    """
    stream, now = io.StringIO(), [100.0]
    log.configure("json", "info", stream)
    try:
        ledger = Ledger(Keeper({}), lambda: now[0])
        number = ledger.open("set", "5/xvda", WHO, {"from": "aio:/a", "to": "log:|aio:/a"})
        quiet = stream.getvalue()
        now[0] = 102.5
        ledger.close(number, Answer(Code.BUSY, sentence="snapshot is under way, order 3"))
    finally:
        log.configure()
    (line,) = map(json.loads, stream.getvalue().splitlines())
    del line["timestamp"]

    assert "" == quiet
    assert {
        "event": "set", "level": "info", "component": "orders", "order": 1, "vbd": "5/xvda", "from": "aio:/a",
        "to": "log:|aio:/a", "code": "busy", "error": "snapshot is under way, order 3", "took": "2.5 s", **WHO,
    } == line  # fmt: skip
    ledger.leave()
