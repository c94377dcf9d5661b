"""A chain exchanged in a worker's process while a frontend is there, comes, or leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driven import Driven
from xenbackend import journal
from xenbackend.blkif.abi import BLKIF_OP_WRITE
from xenbackend.protocol import messages
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE


def test_a_chain_is_exchanged_under_a_guest(driven: Driven, images: list[Path]) -> None:
    """What was in flight ends in the former chain, what comes later goes to the new one; memories are dropped."""
    one, two = images
    driven.connect(f"log:|delay:write=50ms|aio:{one}")
    early = driven.begin_write(DATA)
    driven.worker.send(messages.Swap(f"aio:{two}"))
    driven.worker.stand()
    late = driven.frontend.submit(BLKIF_OP_WRITE, 8, data=DATA)
    answer = driven.worker.expect(messages.Swapped, messages.Unswapped)
    driven.frontend.wait([early, late])
    dropped = [message for message in driven.worker.said if isinstance(message, messages.Drop)]

    assert f"aio:{two}" == answer.chain == answer.layers[0].text == driven.worker.stand().chain
    assert [next(iter(driven.worker.kept))] == [message.name for message in dropped]
    assert [DATA, bytes(PAGE)] == [one.read_bytes()[at : at + PAGE] for at in (0, PAGE)]
    assert [bytes(PAGE), DATA] == [two.read_bytes()[at : at + PAGE] for at in (0, PAGE)]
    assert f"aio:{two}" == (journal.AGREED.read(driven.worker.journal) or {})["chain"]


@pytest.mark.parametrize("chain", ["aio:/nonexistent/image", "ram:512K", "coarse:|ram:1M"])
def test_a_chain_that_cannot_be_taken_changes_nothing(driven: Driven, chain: str) -> None:
    """A refused exchange is answered with a sentence; the guest is served on as it was."""
    driven.connect("ram:1M").write(0, DATA)
    answer = driven.worker.ask(messages.Swap(chain), messages.Swapped, messages.Unswapped)

    assert isinstance(answer, messages.Unswapped)
    assert chain.rsplit(":", maxsplit=1)[-1] in answer.sentence
    assert DATA == driven.frontend.read(0, 8)
    assert "ram:1M" == driven.worker.stand().chain


def test_what_can_be_refused_at_once_is(driven: Driven) -> None:
    """A chain that anybody could see to be wrong does not make the guest wait: what is in flight stays so."""
    driven.connect("delay:write=500ms|ram:1M")
    request = driven.begin_write(DATA)
    answer = driven.worker.ask(messages.Swap("aio:/nonexistent/image"), messages.Swapped, messages.Unswapped)
    driven.frontend.poll()
    status = request.status
    driven.frontend.wait([request])

    assert isinstance(answer, messages.Unswapped)
    assert status is None


def test_a_last_flush_that_fails_keeps_the_chain(driven: Driven, images: list[Path]) -> None:
    """Where the former chain has lost something the guest does not go on in another one; the disk is paused."""
    driven.connect(f"fault:op=flush,limit=1|aio:{images[0]}")
    answer = driven.worker.ask(messages.Swap(f"aio:{images[1]}"), messages.Swapped, messages.Unswapped)

    assert "the last flush failed" in answer.sentence
    assert "a flush failed (EIO)" in driven.worker.stand().paused
    assert 5 == journal.poisoned(driven.worker.journal)
    driven.worker.send(messages.Resume())
    driven.frontend.write(0, DATA)
    assert ("", 0) == (driven.worker.stand().paused, journal.poisoned(driven.worker.journal))


def test_two_exchanges_at_once_are_one_too_many(driven: Driven, images: list[Path]) -> None:
    """Whoever asks for another chain while one is being put in place is told so, and the first one is served."""
    driven.connect("delay:write=100ms|null:1M")
    request = driven.begin_write(DATA)
    for path in images:
        driven.worker.send(messages.Swap(f"aio:{path}"))
    answers = [driven.worker.expect(messages.Swapped, messages.Unswapped) for _ in range(2)]
    driven.frontend.wait([request])

    assert "exchanged already" in answers[0].sentence
    assert f"aio:{images[0]}" == answers[1].chain == driven.worker.stand().chain


def test_who_leaves_during_an_exchange_leaves_after_it(driven: Driven, images: list[Path]) -> None:
    """A frontend that goes away in the middle of an exchange is let go when the chain stands, whatever takes long."""
    driven.connect(f"delay:flush=50ms,write=50ms|aio:{images[0]}")
    driven.begin_write(DATA)
    driven.worker.send(messages.Swap(f"delay:flush=50ms|aio:{images[1]}"))
    driven.worker.send(messages.Disconnect())
    answers = [
        type(driven.worker.expect(messages.Swapped, messages.Unswapped, messages.Disconnected)) for _ in range(2)
    ]

    assert [messages.Swapped, messages.Disconnected] == answers
    driven.worker.end()


def test_who_comes_during_an_exchange_comes_after_it(driven: Driven, images: list[Path]) -> None:
    """A frontend that connects in the middle of an exchange is served by the new chain."""
    driven.open(f"delay:flush=50ms|aio:{images[0]}")
    driven.announce(Wishes())
    driven.worker.send(messages.Swap(f"aio:{images[1]}"))
    driven.offer_rings()
    answer = driven.worker.expect(messages.Swapped, messages.Unswapped)
    driven.joined().write(0, DATA)

    assert f"aio:{images[1]}" == answer.chain
    assert DATA == images[1].read_bytes()[:PAGE]


def test_a_supervisor_that_dies_during_an_exchange(driven: Driven, images: list[Path]) -> None:
    """The worker ends in order, after the exchange, when nobody is left to hear of it."""
    driven.connect(f"delay:flush=50ms,write=50ms|aio:{images[0]}")
    driven.begin_write(DATA)
    driven.worker.send(messages.Swap(f"aio:{images[1]}"))
    driven.worker.socket.close()

    assert driven.worker.process.wait(10) in (0, 1)  # 1 where it still wanted to say something
    assert DATA == images[0].read_bytes()[:PAGE]


def test_no_chain_left_ends_the_worker(driven: Driven) -> None:
    """A layer that fails when its chain is closed leaves none to serve: it is said, and a successor tries again."""
    driven.connect("clumsy:at=close|ram:1M")
    answer = driven.worker.ask(messages.Swap("null:1M"), messages.Swapped, messages.Unswapped)

    assert isinstance(answer, messages.Unswapped)
    assert 1 == driven.worker.process.wait(10)
    assert ["critical"] == [line.level for line in driven.worker.said if isinstance(line, messages.Log)]
