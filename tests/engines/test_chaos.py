"""Chaos below disks of servers and of a cluster, in short; `make chaos-engines` runs it at length."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import main
from tests.chaos.engines import KINDS, missing


@pytest.mark.parametrize("engine", [*KINDS])
def test_kills_under_load_and_orders(engine: str, request: pytest.FixtureRequest) -> None:
    """Whatever is killed, stopped or ordered, no guest sees an error or a wrong sector, and every reply is true."""
    if lacks := missing(engine):
        pytest.skip(f"there is no {', '.join(lacks)} here")
    assert 0 == main(["--engine", engine, "--kills", "6", "--seed", str(request.config.getoption("--seed"))])
