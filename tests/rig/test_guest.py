"""A guest's pages, grants and ports."""

from __future__ import annotations

import os

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel.ports import open_host
from xenbackend.rig.guest import GrantInUse, Guest
from xenbackend.rig.xen import Xen
from xenbackend.units import PAGE


@pytest.fixture
def guest(xen: Xen):
    """A guest of 8 pages."""
    guest = Guest(xen.directory, 5, pages=8)
    yield guest
    guest.close()


def test_allocation(guest: Guest) -> None:
    """A page is allocated once until it is freed; running out of pages is an error that changes nothing."""
    frames = guest.allocate(8)
    assert list(range(8)) == sorted(frames)
    with pytest.raises(KernelError):
        guest.allocate(1)
    guest.free(frames[2:4])

    assert set(frames[2:4]) == set(guest.allocate(2))


def test_pages_side_by_side(guest: Guest) -> None:
    """Pages that lie anywhere can be viewed one after the other."""
    guest.page(6)[:1] = b"a"
    guest.page(1)[:1] = b"b"
    view, release = guest.side_by_side([6, 1])

    assert b"ab" == bytes(view[0:1]) + bytes(view[PAGE : PAGE + 1])
    release()


def test_revoke_refuses_while_mapped(xen: Xen, guest: Guest) -> None:
    """A grant is revoked only when nobody has its page mapped, and its gref is then used again."""
    gref = guest.grant(0)
    grants = open_host(f"xenbackend.rig.host:{xen.directory}").open_grants(5)
    mapping = grants.map([gref], writable=True)
    with pytest.raises(GrantInUse):
        guest.revoke(gref)
    mapping.release()
    guest.revoke(gref)

    assert gref == guest.grant(1)
    grants.close()


def test_port_wait_times_out(guest: Guest) -> None:
    """Waiting for a notification that does not come returns False."""
    port = guest.allocate_port()

    assert not port.wait(0)
    port.close()


def test_closed_port_reaches_nobody(guest: Guest) -> None:
    """A closed port cannot be used, even if the number of its descriptor is in use again."""
    port = guest.allocate_port()
    port.close()
    other = guest.allocate_port()
    with pytest.raises(ValueError, match="negative"):
        port.notify()
    other.close()


def test_closed_port_number_is_free(guest: Guest) -> None:
    """The number of a closed port is given out again."""
    port = guest.allocate_port()
    number = port.number
    port.close()

    assert number == guest.allocate_port().number


def test_a_domain_dies_with_its_ports(xen: Xen) -> None:
    """When a guest ends all its ports are closed, those that its driver forgot included; a closed one stays closed."""
    guest = Guest(xen.directory, 6, pages=8)
    forgotten, closed = guest.allocate_port(), guest.allocate_port()
    descriptor = forgotten.fileno()
    closed.close()
    guest.close()

    assert [-1, -1] == [forgotten.fileno(), closed.fileno()]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
