"""What the supervisor is told about an open layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.block.chain import open_chain, parse_chain
from xenbackend.counters import MOST_FIGURES
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import messages
from xenbackend.protocol.codec import as_fields, restore
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.facts import facts_of
from xenbackend.worker.files import HostFiles


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A loop that does not run."""
    made = Reactor()
    yield made
    made.close()


def test_a_layer_is_told_with_what_it_reported(tmp_path: Path, reactor: Reactor) -> None:
    """A layer's text, size and abilities are those of its geometry, together with the facts that it has reported."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    chain = open_chain(
        parse_chain(f"log:|aio:{image},sector=4096"), EnvFactory(reactor, HostFiles(reactor)), read_only=False
    )
    top, bottom = (facts_of(layer) for layer in chain.layers)
    chain.close()

    assert ("log:", 1 << 20, 4096, 4096, False, True) == (
        top.text, top.size, top.sector_size, top.physical_sector_size, top.read_only, top.can_flush
    )  # fmt: skip
    assert "on" == top.facts["tracking"]
    assert f"aio:{image},sector=4096" == bottom.text
    assert "mode" in bottom.facts


def test_a_layer_that_reports_too_much_is_cut_off(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a driver that reports more than a message has room for, the first facts and figures are told: its worker
    must not be killed for a breach of the protocol.
    """
    chain = open_chain(parse_chain("null:1G"), EnvFactory(reactor, HostFiles(reactor)), read_only=False)
    driver = chain.layers[0].driver
    for number in range(100):
        driver.env.report(f"fact {number}", "")
    monkeypatch.setattr(driver, "figures", lambda: {f"figure {number}": number for number in range(300)})
    told = facts_of(chain.layers[0])
    chain.close()

    assert told == restore(messages.LayerFacts, as_fields(told))
    assert (messages.MAX_FACTS, MOST_FIGURES) == (len(told.facts), len(told.figures))
    assert "figure 0" == told.figures[0]
