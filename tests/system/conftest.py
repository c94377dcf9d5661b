"""A worker for each test, which must survive what the test does to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driven import Driven


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Driven]:
    """A worker; after the test it must still run, have had no bug, and have released everything."""
    with Driven(tmp_path) as driven:
        yield driven
        assert driven.worker.process.poll() is None
        driven.disconnect()
        assert {"mappings": 0, "pins": 0, "ports": 0} == driven.xen.held()
        assert 0 == driven.worker.counters()["bugs"]
        assert [] == [line for line in driven.worker.said if getattr(line, "level", "") == "critical"]
        driven.worker.end()
