"""A small chaos run: what `make chaos` does at length."""

from __future__ import annotations

from argparse import Namespace

import pytest
from rich.console import Console

from tests.chaos.__main__ import run


@pytest.mark.slow
def test_guests_notice_nothing_but_a_pause(request: pytest.FixtureRequest) -> None:
    """Guests under verified load see no error, no wrong sector and no second answer, whatever dies below them; orders
    given meanwhile are answered truthfully.
    """
    args = Namespace(kills=12, hours=None, guests=4, engine="", seed=request.config.getoption("--seed"), only=None)
    figures = run(args, Console(quiet=True))

    assert 0 == figures["errors that guests saw"]
    assert [] == figures["lies"]
    assert figures["orders"] > 0
    assert figures["worker kills"] >= 12
    assert figures["requests verified"] > 0
