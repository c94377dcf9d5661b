"""A served vbd per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import Served


@pytest.fixture
def vbd(tmp_path: Path) -> Iterator[Served]:
    """A guest and a disk, not connected yet; whatever is served must have had no bug when the test is over."""
    with Served(tmp_path) as vbd:
        yield vbd
    assert [] == vbd.bugs
