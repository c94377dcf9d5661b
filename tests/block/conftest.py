"""Fixtures for tests of chains: a machine, and the drivers that only tests have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers_block import EVENTS, TEST_DRIVERS, Clumsy, Machine
from xenbackend.block import drivers


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register the drivers of the tests, and return the list in which they record what they do."""
    for name, place in TEST_DRIVERS.items():
        monkeypatch.setitem(drivers.BUILT_IN, name, place)
    EVENTS.clear()
    Clumsy.failures = 0
    return EVENTS
