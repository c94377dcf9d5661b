"""What the rig's host does beyond the common tests in `tests/contract/test_ports.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel.ports import CopySegment, open_host
from xenbackend.rig.guest import Guest
from xenbackend.rig.wire import Connection
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE


@pytest.fixture
def guest(xen: Xen):
    """A guest of 8 pages."""
    guest = Guest(xen.directory, 5, pages=8)
    yield guest
    guest.close()


def test_injected_fault_fails_copy_and_map(xen: Xen, guest: Guest) -> None:
    """A status injected for a gref is returned for copies and makes mappings fail, until it is cleared."""
    host = open_host(f"xenbackend.rig.host:{xen.directory}")
    grants = host.open_grants(5)
    arena = host.allocate(PAGE)
    gref = guest.grant(0)
    copy = CopySegment(gref, 0, 0, 512, to_guest=True)
    guest.fail(gref, -9)

    assert [-9] == grants.copy(arena, [copy])
    with pytest.raises(KernelError):
        grants.map([gref], writable=True)
    guest.fail(gref, 0)
    assert [0] == grants.copy(arena, [copy])
    grants.close()


def test_closing_returns_every_descriptor(xen: Xen, guest: Guest) -> None:
    """Closing grants and events that still hold something leaves no descriptor open and nothing held."""
    gref, port = guest.grant(0), guest.allocate_port()
    probe = Connection(xen.directory)
    probe.call("held")
    before = len(open_descriptors())
    host = open_host(f"xenbackend.rig.host:{xen.directory}")
    grants, events = host.open_grants(5), host.open_events(5)
    grants.map([gref], writable=True)
    events.bind(port.number)
    grants.close()
    events.close()
    del grants

    # The server drops clients that have left before it answers, so its descriptors for them are closed by now.
    assert {"mappings": 0, "pins": 0, "ports": 0} == probe.call("held")[0]
    assert before == len(open_descriptors())
    probe.close()


def test_release_unmaps(xen: Xen, guest: Guest) -> None:
    """A released mapping is gone from this process, so that thousands of them cost nothing."""
    grants = open_host(f"xenbackend.rig.host:{xen.directory}").open_grants(5)
    gref = guest.grant(0)
    before = Path("/proc/self/maps").read_text().count("memfd:rig-memory")
    for _ in range(3):
        grants.map([gref], writable=True).release()

    assert before == Path("/proc/self/maps").read_text().count("memfd:rig-memory")
    grants.close()


def test_unknown_domain(xen: Xen) -> None:
    """Grants of an unknown domain cannot be opened."""
    with pytest.raises(KernelError):
        open_host(f"xenbackend.rig.host:{xen.directory}").open_grants(99)


def test_scattered_copies(xen: Xen, guest: Guest) -> None:
    """Many copies in one call each go to their own place."""
    host = open_host(f"xenbackend.rig.host:{xen.directory}")
    grants = host.open_grants(5)
    arena = host.allocate(8 * 512)
    arena.view[:] = b"".join(bytes([number]) * 512 for number in range(8))
    grefs = [guest.grant(frame) for frame in range(8)]
    segments = [CopySegment(gref, 512 * place, 512 * place, 512, to_guest=True) for place, gref in enumerate(grefs)]

    assert [0] * 8 == grants.copy(arena, segments)
    assert list(range(8)) == [guest.page(place)[512 * place] for place in range(8)]
    assert [0] * 8 == [guest.page(place)[512 * place - 1] for place in range(1, 8)] + [0]
    grants.close()
