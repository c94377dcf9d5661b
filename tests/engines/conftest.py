"""What the tests of engines share: the embedded machine, and one Ceph for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.ceph import Ceph
from xenbackend.embedded.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """An embedded machine with the real service."""
    with Machine() as machine:
        yield machine


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A cluster. Each test uses images with names of its own."""
    with Ceph(tmp_path_factory.mktemp("ceph")) as ceph:
        yield ceph
