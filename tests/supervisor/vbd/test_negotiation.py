"""What a frontend is offered, and how its rings are joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import LAYER
from xenbackend.blkif.features import Frontend, FrontendRing, Limits
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Join
from xenbackend.supervisor.vbd.negotiation import connect_of, disk_of, export_url, join_of, keys_for
from xenbackend.supervisor.vbd.spec import Spec
from xenbackend.supervisor.xenstore.nodes import SENTENCE_MAX

LIMITS = Limits()
DISK = disk_of(LAYER, None, {})


def test_a_disk_that_is_open_is_published() -> None:
    """The keys of an open disk say what a guest may ask for, the disk's size, and that the script is answered."""
    keys = keys_for({"hotplug-error": "of a former try"}, LIMITS, disk=DISK)

    assert ("connected", "2097152", "256") == (
        keys["hotplug-status"], keys["sectors"], keys["feature-max-indirect-segments"]
    )  # fmt: skip
    assert [None] * 3 == [keys[key] for key in ("hotplug-error", "physical-device-path", "flush-failed")]


def test_a_disk_that_is_not_open_yet_has_no_size() -> None:
    """Before a disk is open, its keys have only what the service itself can do."""
    keys = keys_for({}, LIMITS)

    assert not {"sectors", "hotplug-status", "hotplug-error"} & keys.keys()
    assert "4" == keys["multi-queue-max-queues"]


def test_a_problem_is_told_to_the_script_once_it_has_come() -> None:
    """An error is written at once, cut to the quota of a value; the status only once the script has come."""
    early = keys_for({}, LIMITS, disk=DISK, problem="x" * 5000, has_come=False)
    told = keys_for({}, LIMITS, disk=DISK, problem="x")

    assert ("x" * SENTENCE_MAX, False) == (early["hotplug-error"], "hotplug-status" in early)
    assert ("x", "error", False) == (told["hotplug-error"], told["hotplug-status"], "sectors" in told)


@pytest.mark.parametrize(("state", "is_kept"), [("1", False), ("2", False), ("4", True), ("5", True)])
def test_what_a_connected_frontend_was_offered_stays(state: str, *, is_kept: bool) -> None:
    """A connected frontend keeps the offer that it has read, even if a service with other limits takes over."""
    keys = keys_for({"state": state, "feature-max-indirect-segments": "16"}, LIMITS, disk=DISK)

    assert is_kept == ("feature-max-indirect-segments" not in keys)


def test_a_failed_flush_stands_there() -> None:
    """A failed flush is written to the keys, for a service that finds nothing else of the disk's past."""
    assert "x" == keys_for({}, LIMITS, flush_failed="x")["flush-failed"]


@pytest.mark.parametrize(("kind", "url"), [("vbd", "nbd+unix:///?socket=/run/x"), ("vbd3", "/run/x")])
def test_an_export_is_named_as_its_reader_needs_it(kind: str, url: str) -> None:
    """The export is written as a URL for QEMU, and as a path for kind vbd3; without an export there is no key."""
    assert url == export_url(kind, "/run/x")
    assert export_url(kind, "") is None


def test_a_disk_is_no_more_than_chain_and_toolstack_allow() -> None:
    """The guest is offered only what both the chain and the toolstack allow."""
    spec = Spec("null:1G", read_only=True, shareable=False, cdrom=True, removable=True)
    disk = disk_of(LAYER, spec, {"discard-enable": "0"})

    assert (True, False, True, True) == (disk.read_only, disk.can_discard, disk.cdrom, disk.removable)
    assert (False, True) == (disk_of(LAYER, None, {}).read_only, disk_of(LAYER, None, {}).can_discard)


def test_a_disk_has_the_sectors_of_its_chain() -> None:
    """The frontend is told the sector sizes of the chain's top layer."""
    disk = disk_of(replace(LAYER, sector_size=512, physical_sector_size=4096), None, {})

    assert (512, 4096) == (disk.sector_size, disk.physical_sector_size)


def test_rings_are_joined_as_the_frontend_was_offered() -> None:
    """Rings are joined by what the keys offered, and not by today's limits; the message to the worker says the same."""
    join = join_of({"feature-discard": "1", "feature-max-indirect-segments": "16"}, Limits(), goes_on=True)
    chosen = Frontend("x86_64-abi", [FrontendRing([1, 2], 3)], persistent=True)

    assert Join(can_discard=True, max_segments=16, goes_on=True) == join
    rings = [messages.RingParameters([1, 2], 3)]
    assert messages.Connect("x86_64-abi", rings, True, True, 16, True) == connect_of(chosen, join)
    assert Join(can_discard=False, max_segments=32) == join_of({}, Limits(max_segments=32), goes_on=False)
