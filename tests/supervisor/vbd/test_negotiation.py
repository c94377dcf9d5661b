"""What a frontend is offered, and how its rings are joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import LAYER
from xenbackend.blkif.features import Frontend, FrontendRing, Limits
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd.events import Join
from xenbackend.supervisor.vbd.negotiation import connect_of, disk_of, export_url, join_of
from xenbackend.supervisor.vbd.spec import Spec


@pytest.mark.parametrize(("kind", "url"), [("vbd", "nbd+unix:///?socket=/run/x"), ("vbd3", "/run/x")])
def test_an_export_is_named_as_its_reader_needs_it(kind: str, url: str) -> None:
    """QEMU gets a URL, kind vbd3 the path; no export is no key."""
    assert url == export_url(kind, "/run/x")
    assert export_url(kind, "") is None


def test_a_disk_is_no_more_than_chain_and_toolstack_allow() -> None:
    """What the toolstack forbids counts like what the chain cannot do."""
    spec = Spec("null:1G", read_only=True, shareable=False, cdrom=True, removable=True)
    disk = disk_of(LAYER, spec, {"discard-enable": "0"})

    assert (True, False, True, True) == (disk.read_only, disk.can_discard, disk.cdrom, disk.removable)
    assert (False, True) == (disk_of(LAYER, None, {}).read_only, disk_of(LAYER, None, {}).can_discard)


def test_a_disk_has_the_sectors_of_its_chain() -> None:
    """What the chain's top layer says of its sectors is what the frontend is told."""
    disk = disk_of(replace(LAYER, sector_size=512, physical_sector_size=4096), None, {})

    assert (512, 4096) == (disk.sector_size, disk.physical_sector_size)


def test_rings_are_joined_as_the_frontend_was_offered() -> None:
    """What stands in the keys holds, not what we would offer today; the message to the worker says the same."""
    join = join_of({"feature-discard": "1", "feature-max-indirect-segments": "16"}, Limits(), goes_on=True)
    chosen = Frontend("x86_64-abi", [FrontendRing([1, 2], 3)], persistent=True)

    assert Join(can_discard=True, max_segments=16, goes_on=True) == join
    rings = [messages.RingParameters([1, 2], 3)]
    assert messages.Connect("x86_64-abi", rings, True, True, 16, True) == connect_of(chosen, join)
    assert Join(can_discard=False, max_segments=32) == join_of({}, Limits(max_segments=32), goes_on=False)
