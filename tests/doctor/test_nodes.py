"""What a report contains of xenstore, whatever guests write there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.doctor import nodes
from xenbackend.errors import StoreError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.store import Store

BACKEND = "/local/domain/0/backend/vbd"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with a disk for each of two guests."""
    with Xenstored(tmp_path / "store") as started, Store(started.address) as store:
        for guest in (5, 6):
            store.write(f"{BACKEND}/{guest}/51712/state", "4")
            store.write(f"/local/domain/{guest}/device/vbd/51712/queue-0/ring-ref", "8")
            store.write(f"/local/domain/{guest}/console/vnc-pass", "secret")
        store.write("/local/domain/0/xenbackend/vbd/5/51712/phase", "serving")
        yield store


def test_both_ends_of_each_disk(store: Store) -> None:
    """Both ends of each disk and what the service shows of it are included, and no other nodes of guests."""
    text = nodes.text(store, ["vbd"], 5.0)

    for guest in (5, 6):
        assert f"{BACKEND}/{guest}/51712/state = '4'\n" in text
        assert f"/local/domain/{guest}/device/vbd/51712/queue-0/ring-ref = '8'\n" in text
    assert "/local/domain/0/xenbackend/vbd/5/51712/phase = 'serving'\n" in text
    assert "secret" not in text


@pytest.mark.parametrize(("count", "width"), [(300, 1), (60, 2000)])
def test_one_guest_hides_no_other(store: Store, monkeypatch: pytest.MonkeyPatch, count: int, width: int) -> None:
    """Of too many or too long nodes of one guest a share is included, with a note, and others are complete."""
    monkeypatch.setattr(nodes, "_MOST", 200)
    for number in range(count):
        store.write(f"/local/domain/5/device/vbd/51712/junk-{number}", "x" * width)
    text = nodes.text(store, ["vbd"], 5.0)

    assert "# the ends of domain 5: the rest is left out, after " in text
    assert text.count("junk-") <= 100
    assert len(text) < 200 * 2 * nodes._WIDTH
    assert "/local/domain/6/device/vbd/51712/queue-0/ring-ref = '8'\n" in text
    assert "phase = 'serving'" in text


def test_one_that_cannot_be_read_keeps_no_other_from_being_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one guest's nodes change so often that they cannot be read, the others are still included."""
    listed = store.directory

    def directory(path: str) -> list[str]:
        if path.startswith("/local/domain/5/"):
            raise StoreError("it kept changing while it was read", 11)
        return listed(path)

    monkeypatch.setattr(store, "directory", directory)
    text = nodes.text(store, ["vbd"], 5.0)

    assert "# the ends of domain 5: it kept changing while it was read\n" in text
    assert "/local/domain/6/device/vbd/51712/queue-0/ring-ref = '8'\n" in text


def test_a_slow_xenstore_costs_what_it_has_not_told_yet(store: Store) -> None:
    """If xenstore is too slow, the report has what was read in time."""
    text = nodes.text(store, ["vbd"], 0.0)

    assert "our ends of the disks of domain 5: the rest is left out, because reading took too long" in text
    assert "phase" not in text
