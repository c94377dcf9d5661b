"""What is read of a domain."""

from __future__ import annotations

import pytest

from xenbackend.supervisor.xenstore.domain import boots_by_device_model, is_incoming
from xenbackend.supervisor.xenstore.store import Store


@pytest.mark.parametrize(("name", "expected"), [("db--incoming", True), ("db", False), ("db--migratedaway", False)])
def test_a_guest_on_its_way_here_is_known_by_its_name(toolstack: Store, name: str, *, expected: bool) -> None:
    """Only the name that xl gives to the receiving end of a migration counts."""
    toolstack.write("/local/domain/5/name", name)

    assert expected is is_incoming(toolstack, 5)


@pytest.mark.parametrize(("kind", "expected"), [("hvm", True), ("pv", False), ("pvh", False)])
def test_only_hvm_guests_boot_by_a_device_model(toolstack: Store, kind: str, *, expected: bool) -> None:
    """PV and PVH guests have no emulated disk."""
    toolstack.write("/libxl/5/type", kind)

    assert expected is boots_by_device_model(toolstack, 5)


def test_what_cannot_be_read_is_not_so(toolstack: Store) -> None:
    """A domain without these nodes, and a xenstore that is away, leave a disk as it is for most guests."""
    assert (False, False) == (is_incoming(toolstack, 5), boots_by_device_model(toolstack, 5))
    toolstack.close()
    assert (False, False) == (is_incoming(toolstack, 5), boots_by_device_model(toolstack, 5))
