"""What the supervisor is told about an open layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.block.chain import open_chain, parse_chain
from xenbackend.loop.reactor import Reactor
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
