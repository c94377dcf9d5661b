"""A small chaos run: what `make chaos` does at length."""

from __future__ import annotations

import pytest
from rich.console import Console

from tests.chaos.__main__ import parse, run


@pytest.mark.slow
def test_guests_notice_nothing_but_a_pause(request: pytest.FixtureRequest) -> None:
    """Guests under verified load see no error, no wrong sector and no second answer, whatever dies below them; orders
    given meanwhile are answered truthfully.
    """
    args = ["--kills", "12", "--guests", "4", "--seed", str(request.config.getoption("--seed"))]
    figures = run(parse(args), Console(quiet=True))

    assert 0 == figures["errors that guests saw"]
    assert [] == figures["lies"]
    assert figures["orders"] > 0
    assert figures["worker kills"] >= 12
    assert figures["requests verified"] > 0
