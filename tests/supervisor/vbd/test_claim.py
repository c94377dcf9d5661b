"""Taking a vbd from the kernel's backend, with a model of that kernel: its bus is a directory, fed by xenstore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.helpers import PATH, Clock, Kept, Stepped, offer_ring, remove_like_libxl, settle, write_like_libxl
from xenbackend.blkif.features import Limits
from xenbackend.errors import XenbackendError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.claim import PAUSE_S, RETRY_S, TIMEOUT_S, Bus, Claim, Taking
from xenbackend.supervisor.vbd.notes import Claimed
from xenbackend.supervisor.xenstore.paths import VbdPath, libxl_path
from xenbackend.supervisor.xenstore.store import Store

DEVICE = f"vbd-{PATH.frontend_domid}-{PATH.devid}"


class Kernel:
    """The kernel's xen-backend bus: a device stands for each directory seen in Initialising until it is seen gone."""

    def __init__(self, root: Path, address: str) -> None:
        self.bus = Bus(root)
        self.store = Store(address)
        self._device = root / DEVICE

    def look(self) -> None:
        """Do what xenbus_dev_changed does."""
        if not self.store.directory(PATH.backend):
            self._device.unlink(missing_ok=True)
        elif self.store.read_optional(f"{PATH.backend}/state") == "1":
            self._device.touch()

    def probe(self) -> None:
        """Do what xen-blkback does with a device: write what it offers, whether or not the directory is there."""
        if self._device.exists():
            self.store.write(f"{PATH.backend}/feature-max-indirect-segments", "256")
            self.store.write(f"{PATH.backend}/state", "2")


@pytest.fixture
def kernel(xenstored: Xenstored, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel with an empty bus."""
    kernel = Kernel(tmp_path, xenstored.address)
    yield kernel
    kernel.store.close()


def _make(toolstack: Store, kernel: Kernel) -> dict[str, str]:
    """Let libxl make a vbd and blkback take it; return its keys."""
    write_like_libxl(toolstack)
    toolstack.write(f"{libxl_path(PATH)}/backend", PATH.backend)
    kernel.look()
    kernel.probe()
    return toolstack.dictionary(PATH.backend)


def test_a_claimed_vbd_is_the_same_without_the_kernel(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """After a claim all keys and permissions are as before, in InitWait, and the kernel's device is gone for good."""
    del guest
    before = _make(toolstack, kernel)
    rights = toolstack.get_permissions(f"{PATH.backend}/params")
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0)

    assert (True, False) == (kernel.bus.has(PATH), claim.step())
    kernel.look()
    assert claim.step()
    kernel.look()
    assert (before, rights) == (toolstack.dictionary(PATH.backend), toolstack.get_permissions(f"{PATH.backend}/params"))
    assert not kernel.bus.has(PATH)


def test_what_blkback_writes_too_late_goes_too(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """Keys that a driver writes into the directory after it was removed do not make a vbd, and are removed."""
    del guest
    before = _make(toolstack, kernel)
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0)
    claim.step()
    kernel.probe()
    kernel.look()
    assert kernel.bus.has(PATH)
    assert not claim.step()
    kernel.look()

    assert claim.step()
    assert before == toolstack.dictionary(PATH.backend)


@pytest.mark.parametrize("gone", [f"{PATH.frontend}", libxl_path(PATH)])
def test_a_vbd_that_was_destroyed_meanwhile_stays_away(
    toolstack: Store, kernel: Kernel, guest: Store, gone: str
) -> None:
    """If the toolstack removes the vbd while its directory is away, the directory is not made again."""
    del guest
    _make(toolstack, kernel)
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0)
    claim.step()
    toolstack.remove(gone)
    kernel.look()

    assert claim.step()
    assert [] == toolstack.directory(PATH.backend)


def test_a_vbd_that_is_to_go_is_left_alone(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """A vbd that is being removed is not claimed: the toolstack that waits for Closed needs its directory."""
    del guest
    _make(toolstack, kernel)
    remove_like_libxl(toolstack)
    before = toolstack.dictionary(PATH.backend)

    assert Claim(toolstack, kernel.bus, PATH, lambda: 0.0).step()
    assert before == toolstack.dictionary(PATH.backend)


def test_a_kernel_that_does_not_let_go_is_told(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """If the kernel keeps its device for too long, the claim fails, and the directory is put back for the toolstack."""
    del guest
    before = _make(toolstack, kernel)
    times = iter([0.0, 1.0, TIMEOUT_S + 1])
    claim = Claim(toolstack, kernel.bus, PATH, lambda: next(times))
    claim.step()
    with pytest.raises(XenbackendError, match=f"did not release {DEVICE} within 10 s; see in dmesg"):
        claim.step()

    assert before == toolstack.dictionary(PATH.backend)


def test_other_kinds_are_nobodys(tmp_path: Path) -> None:
    """A device of kind vbd3 need not be claimed: it is on the bus too, but Linux has no driver for it."""
    (tmp_path / "vbd3-5-51712").touch()

    assert not Bus(tmp_path).has(VbdPath("vbd3", 0, 5, 51712))


def test_a_transaction_that_has_to_be_repeated_is_no_reason_to_stop(
    toolstack: Store, kernel: Kernel, guest: Store
) -> None:
    """If somebody writes at the same moment, the transaction is repeated, and the claim goes on."""
    del guest
    _make(toolstack, kernel)

    notes: list[Any] = []

    def note(value: Any) -> None:
        notes.append(value)
        if len(notes) == 1:
            kernel.store.write(f"{PATH.backend}/dev", "xvdb")  # within our transaction

    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0, note)
    is_over = claim.step()
    away = toolstack.directory(PATH.backend)
    kernel.look()

    assert (False, []) == (is_over, away)
    assert claim.step()
    assert "xvdb" == toolstack.read(f"{PATH.backend}/dev")
    assert notes[-1] is None


def test_a_claim_is_gone_on_with_by_the_next_service(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """The directory's contents are noted before it is removed, so that the next service can finish the claim of a
    service that dies.
    """
    del guest
    before = _make(toolstack, kernel)
    notes: list[Any] = []
    Claim(toolstack, kernel.bus, PATH, lambda: 0.0, notes.append).step()
    assert [] == toolstack.directory(PATH.backend)
    noted = notes[-1]
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0, notes.append, noted)
    assert not claim.step()
    kernel.look()

    assert claim.step()
    assert (before, None) == (toolstack.dictionary(PATH.backend), notes[-1])


def test_a_claim_that_was_noted_and_never_made_takes_nothing_away(
    toolstack: Store, kernel: Kernel, guest: Store
) -> None:
    """If a claim was noted but never made, the directory that exists is left as it is."""
    del guest
    before = _make(toolstack, kernel)
    notes: list[Any] = []
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0, notes.append, Claimed({}, [], is_in_libxl=False))

    assert claim.step()
    assert (before, [None]) == (toolstack.dictionary(PATH.backend), notes)


class Taken:
    """A vbd being claimed, in a loop whose clock stands still."""

    def __init__(self, store: Store, bus: Bus, claim: Claim | None = None) -> None:
        self.clock = Clock()
        self.loop = Reactor(self.clock)
        self.ends: list[XenbackendError | None] = []
        self.begun = 0
        self._store, self._bus = store, bus
        self.taking = Taking(self.loop, self._begin, self.ends.append, claim)

    def _begin(self) -> Claim:
        self.begun += 1
        return Claim(self._store, self._bus, PATH, self.clock)

    def pass_time(self, seconds: float = 0.0) -> None:
        """Let some time pass."""
        self.clock.time += seconds
        settle(self.loop, 3)


@pytest.fixture
def taken(toolstack: Store, kernel: Kernel, guest: Store) -> Iterator[Taken]:
    """A vbd that the kernel's backend has."""
    del guest
    _make(toolstack, kernel)
    taken = Taken(toolstack, kernel.bus)
    yield taken
    taken.loop.close()


def test_a_claim_is_gone_on_with_as_time_goes_by(taken: Taken, kernel: Kernel) -> None:
    """A claim begins with the loop's next pass, looks at the bus periodically and ends once; another may follow."""
    assert not taken.taking.is_under_way
    taken.taking.begin()
    taken.taking.begin()
    taken.pass_time()
    assert (True, [], 1) == (taken.taking.is_under_way, taken.ends, taken.begun)
    kernel.look()
    taken.pass_time(PAUSE_S / 2)
    assert taken.taking.is_under_way
    taken.pass_time(PAUSE_S)
    assert (False, [None]) == (taken.taking.is_under_way, taken.ends)
    taken.pass_time(TIMEOUT_S)
    taken.taking.begin()
    taken.pass_time()

    assert [None, None] == taken.ends


def test_a_claim_that_fails_is_over(taken: Taken) -> None:
    """If the kernel does not release the device in time, the claim ends with an error."""
    taken.taking.begin()
    taken.pass_time()
    taken.pass_time(TIMEOUT_S)

    assert ["did not release" in str(each) for each in taken.ends] == [True]
    assert not taken.taking.is_under_way


def test_xenstore_that_is_away_delays_a_claim(
    taken: Taken, xenstored: Xenstored, toolstack: Store, kernel: Kernel
) -> None:
    """A claim goes on when xenstore is back."""
    taken.taking.begin()
    xenstored.stop()
    taken.pass_time()
    xenstored.start()
    toolstack.reconnect()
    kernel.store.reconnect()
    taken.pass_time(RETRY_S)
    kernel.look()
    taken.pass_time(RETRY_S)

    assert [None] == taken.ends


def test_a_claim_of_an_earlier_service_goes_on_by_itself(toolstack: Store, kernel: Kernel, guest: Store) -> None:
    """The claim of an earlier service goes on without being begun again."""
    del guest
    _make(toolstack, kernel)
    claim = Claim(toolstack, kernel.bus, PATH, lambda: 0.0)
    claim.step()
    kernel.look()
    taken = Taken(toolstack, kernel.bus, claim)
    taken.pass_time()
    taken.loop.close()

    assert (0, [None]) == (taken.begun, taken.ends)


def test_a_claim_that_is_given_back_is_over(taken: Taken, toolstack: Store) -> None:
    """If a claim is given back, the directory exists again, and nothing more is done."""
    taken.taking.begin()
    taken.pass_time()
    assert [] == toolstack.directory(PATH.backend)
    taken.taking.give_back()
    taken.taking.give_back()
    taken.pass_time(TIMEOUT_S)

    assert toolstack.directory(PATH.backend)
    assert (False, []) == (taken.taking.is_under_way, taken.ends)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [True, False])
def test_a_service_that_stops_gives_back_what_it_was_claiming(
    xenstored: Xenstored, toolstack: Store, kernel: Kernel, guest: Store, kept: Kept, *, leaves: bool
) -> None:
    """A service that stops during a claim puts the directory back; the next service claims the vbd anew."""
    del guest
    before = _make(toolstack, kernel)
    stepped = Stepped(xenstored.address, Settings(), bus=kernel.bus, keeper=kept.keeper())
    stepped.until(lambda: stepped.registry.vbds and not toolstack.directory(PATH.backend))
    stepped.leave() if leaves else stepped.close()
    assert before.items() <= toolstack.dictionary(PATH.backend).items()
    stepped = Stepped(xenstored.address, Settings(), bus=kernel.bus, keeper=kept.keeper())
    try:
        stepped.until(lambda: stepped.registry.vbds and not toolstack.directory(PATH.backend))
        kernel.look()
        stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    finally:
        stepped.close()

    assert {} == kept.fds


@pytest.mark.slow
def test_no_ring_is_joined_while_the_kernel_has_the_device(
    xenstored: Xenstored, toolstack: Store, kernel: Kernel, guest: Store
) -> None:
    """A frontend that has answered blkback's offer is served once the kernel has released the device."""
    _make(toolstack, kernel)
    offer_ring(guest)
    stepped = Stepped(xenstored.address, Settings(), bus=kernel.bus)
    try:
        stepped.until(lambda: stepped.registry.vbds and not toolstack.directory(PATH.backend))
        for _ in range(20):
            stepped.turn()
        assert [] == stepped.answers
        kernel.look()
        stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/state") == "4")
    finally:
        stepped.close()

    assert [Code.OK] == [each.code for each in stepped.answers]


@pytest.mark.slow
def test_what_the_kernel_offered_is_served(
    xenstored: Xenstored, toolstack: Store, kernel: Kernel, guest: Store
) -> None:
    """A frontend that chose more queues than our settings allow is served, because it goes by blkback's offer."""
    _make(toolstack, kernel)
    guest.write(f"{PATH.frontend}/multi-queue-num-queues", "2")
    for queue in "01":
        guest.write(f"{PATH.frontend}/queue-{queue}/ring-ref", f"8{queue}")
        guest.write(f"{PATH.frontend}/queue-{queue}/event-channel", f"3{queue}")
    guest.write(f"{PATH.frontend}/state", "3")
    stepped = Stepped(xenstored.address, Settings(limits=Limits(max_queues=1)), bus=kernel.bus)
    try:
        stepped.until(lambda: stepped.registry.vbds and not toolstack.directory(PATH.backend))
        kernel.look()
        stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/state") == "4")
    finally:
        stepped.close()
