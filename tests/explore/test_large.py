"""All interleavings on larger rings, which takes minutes: `make test-model`."""

from __future__ import annotations

import pytest

from tests import figures
from tests.explore.patches import WRONG, make_wrong, use_words
from tests.explore.search import Bounds, Search

BOUNDS = [
    Bounds(slots=2, requests=4, kills=2, limits=(1, 2)),
    Bounds(slots=2, requests=5, kills=2, limits=(1, 2)),
    Bounds(slots=2, requests=4, kills=3, limits=(1, 2), start=2**32 - 2),
    Bounds(slots=4, requests=4, kills=1, limits=(4,), forgets=True),
    Bounds(slots=4, requests=5, kills=1, limits=(4,), together=1, forgets=True),
]


@pytest.fixture(autouse=True)
def large(request: pytest.FixtureRequest) -> None:
    """Skip these tests unless they are asked for."""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes; --long, or make test-model")


@pytest.mark.slow
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_nothing_is_lost_repeated_or_overwritten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bounds: Bounds
) -> None:
    """Whatever guest and disk do, and wherever workers die, each request is done, then answered once."""
    use_words(monkeypatch, bounds.slots)
    found = Search(bounds).run()
    with capsys.disabled():
        print(f"\n{bounds}: {found.states} states, {found.violations.total()} violations")

    assert {} == found.violations, found.path
    figures.add("states", found.states)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("bounds", [BOUNDS[0], BOUNDS[-1]], ids=str)
def test_what_is_known_to_be_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str, bounds: Bounds
) -> None:
    """Each change that is known to make the code wrong leads to a violation, whatever the size of the ring."""
    use_words(monkeypatch, bounds.slots)
    make_wrong(monkeypatch, WRONG[wrong])
    found = Search(bounds, stops=True).run()
    with capsys.disabled():
        print(f"\n{bounds}, {wrong}: {found.states} states until {', '.join(found.violations)}")

    assert found.violations
