"""A disk for each test, served in the test's own process or by a worker's process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driven import Driven
from tests.helpers_block import TEST_DRIVERS
from tests.served import Served


@pytest.fixture
def vbd(tmp_path: Path) -> Iterator[Served]:
    """A guest and a disk, not connected yet. The test must not cause a bug."""
    with Served(tmp_path) as vbd:
        yield vbd
    assert [] == vbd.bugs


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    """A worker's process that also knows a driver with bugs and one with large sectors."""
    with Driven(tmp_path, drivers={name: TEST_DRIVERS[name] for name in ("clumsy", "coarse", "lingering")}) as driven:
        yield driven


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two images of the size of `ram:1M`."""
    made = [tmp_path / "one", tmp_path / "two"]
    for path in made:
        path.write_bytes(bytes(1 << 20))
    return made
