"""The rules of the simulated Xen, without a socket."""

from __future__ import annotations

import errno

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.rig.hypervisor import Holder, Hypervisor
from xenbackend.rig.table import Table

DOMID = 5


class Machine:
    """A hypervisor with one guest and one backend."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor()
        self.guest = self.hypervisor.enter()
        self.backend = self.hypervisor.enter()
        _, (_, grants) = self.call(self.guest, "create", domid=DOMID, pages=16)
        self.table = Table(grants, 16)

    def call(self, holder: Holder, name: str, **arguments):
        """Make a call for a user."""
        return self.hypervisor.call(holder, name, arguments)

    def map(self, *grefs: int, writable: bool = True) -> int:
        """Map grants for the backend and return the handle."""
        return self.call(self.backend, "map", domid=DOMID, grefs=list(grefs), writable=writable)[0]["handle"]

    def held(self) -> dict[str, int]:
        """Return what all backends hold together."""
        return self.call(self.backend, "held")[0]


@pytest.fixture
def machine() -> Machine:
    """A machine with page 3 granted by gref 8 and page 5 by gref 9."""
    machine = Machine()
    machine.table.set(8, 0, 3, read_only=False)
    machine.table.set(9, 0, 5, read_only=False)
    return machine


def test_page_is_in_use_while_any_mapping_lives(machine: Machine) -> None:
    """A page counts as in use until the last of its mappings is gone."""
    one, two = machine.map(8, 9), machine.map(8, writable=False)
    machine.call(machine.backend, "unmap", handle=one)

    assert (True, False) == (machine.table.in_use(8), machine.table.in_use(9))
    machine.call(machine.backend, "unmap", handle=two)
    assert not machine.table.in_use(8)


def test_held_counts(machine: Machine) -> None:
    """The report of what is held counts mappings, pages and ports, of one domain or of all."""
    machine.map(8, 9)
    machine.map(8)
    port = machine.call(machine.guest, "allocate_port", remote_domid=0)[0]["port"]
    machine.call(machine.backend, "bind", domid=DOMID, port=port)

    assert {"mappings": 2, "pins": 3, "ports": 1} == machine.held()
    assert {"mappings": 0, "pins": 0, "ports": 0} == machine.call(machine.backend, "held", domid=6)[0]


def test_leaving_releases_everything(machine: Machine) -> None:
    """When a backend leaves, all that it held is released and can be taken again."""
    machine.map(8, 9)
    port = machine.call(machine.guest, "allocate_port", remote_domid=0)[0]["port"]
    machine.call(machine.backend, "bind", domid=DOMID, port=port)
    machine.hypervisor.leave(machine.backend)
    machine.backend = machine.hypervisor.enter()

    assert {"mappings": 0, "pins": 0, "ports": 0} == machine.held()
    assert not machine.table.in_use(8)
    machine.call(machine.backend, "bind", domid=DOMID, port=port)


def test_domain_dies_with_its_owner(machine: Machine) -> None:
    """When a guest leaves its domain ends: nothing is granted, and its number is free."""
    handle = machine.map(8)
    machine.hypervisor.leave(machine.guest)
    with pytest.raises(KernelError) as caught:
        machine.map(9)

    assert errno.ESRCH == caught.value.errno
    assert machine.table.frame(9, 0, writable=False) < 0
    machine.call(machine.backend, "unmap", handle=handle)
    machine.call(machine.hypervisor.enter(), "create", domid=DOMID, pages=1)


def test_port_for_somebody_else(machine: Machine) -> None:
    """A port that the guest offered to another domain cannot be bound."""
    port = machine.call(machine.guest, "allocate_port", remote_domid=7)[0]["port"]
    with pytest.raises(KernelError):
        machine.call(machine.backend, "bind", domid=DOMID, port=port)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("create", {"domid": 0, "pages": 1}, errno.EEXIST),
        ("create", {"domid": DOMID, "pages": 1}, errno.EEXIST),
        ("open", {"domid": 77}, errno.ESRCH),
        ("map", {"domid": DOMID, "grefs": [], "writable": True}, errno.EINVAL),
        ("map", {"domid": DOMID, "grefs": [8, 11], "writable": True}, errno.EINVAL),
        ("unmap", {"handle": 1}, errno.ENOENT),
        ("unbind", {"port": 1}, errno.ENOTCONN),
        ("allocate_port", {"remote_domid": 0}, errno.EPERM),
        ("close_port", {"port": 1}, errno.EPERM),
        ("reboot", {}, errno.ENOSYS),
    ],
)
def test_refusals(machine: Machine, name: str, arguments: dict, expected: int) -> None:
    """A call that cannot be done is refused with its own errno and holds nothing."""
    with pytest.raises(KernelError) as caught:
        machine.call(machine.backend, name, **arguments)

    assert expected == caught.value.errno
    assert {"mappings": 0, "pins": 0, "ports": 0} == machine.held()
    assert not machine.table.in_use(8)


def test_a_machine_leaves_no_descriptor() -> None:
    """Memory and ports of a dead domain leave no descriptor open."""
    before = len(open_descriptors())
    machine = Machine()
    machine.call(machine.guest, "allocate_port", remote_domid=0)
    machine.hypervisor.leave(machine.guest)
    del machine

    assert before == len(open_descriptors())
