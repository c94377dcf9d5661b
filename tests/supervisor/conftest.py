"""A simulated xenstored, connections to it, and a running registry."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import Kept, Stepped
from xenbackend import log
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.xenstore.store import Store


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A xenstored with domain 5 in it."""
    with Xenstored(tmp_path / "store") as store:
        store.add_domain_socket(5)
        yield store


@pytest.fixture
def toolstack(xenstored: Xenstored) -> Iterator[Store]:
    """A connection of domain 0, as a toolstack has."""
    with Store(xenstored.address) as store:
        yield store


@pytest.fixture
def guest(xenstored: Xenstored) -> Iterator[Store]:
    """A connection of domain 5."""
    with Store(xenstored.add_domain_socket(5)) as store:
        yield store


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """A keeper of descriptors."""
    kept = Kept(tmp_path)
    yield kept
    kept.close()


@pytest.fixture
def stepped(xenstored: Xenstored) -> Iterator[Stepped]:
    """A running registry with a fake worker for every vbd."""
    registry = Stepped(xenstored.address, Settings())
    yield registry
    registry.close()


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """The log of the test, in the journal's form or in the form that the test is parametrized with."""
    stream = io.StringIO()
    log.configure(getattr(request, "param", "journal"), "info", stream)
    yield stream
    structlog.reset_defaults()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Check that the test leaves no descriptor open."""
    before = open_descriptors()
    yield
    assert before == open_descriptors()
