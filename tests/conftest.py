"""Options of all tests."""

from __future__ import annotations

import pytest

from xenbackend.image import session


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let random tests run longer, or again."""
    parser.addoption("--requests", type=int, default=20_000, help="requests of tests against a model of the disk")
    parser.addoption("--explore", action="store_true", help="look at every order of events on larger rings, too")
    parser.addoption("--seed", type=int, default=1, help="start of random numbers")


@pytest.fixture
def no_wait_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test knows who has an image, nobody waits for that one to let go."""
    monkeypatch.setattr(session, "LOCK_TIMEOUT_S", 0.0)
