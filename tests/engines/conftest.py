"""What tests of engines share: the embedded machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xenbackend.embedded.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """An embedded machine with the real service."""
    with Machine() as machine:
        yield machine
