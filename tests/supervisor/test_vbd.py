"""One vbd in service when xenstore or a guest gets in its way; its usual life is in `test_registry.py`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.supervisor.helpers import PATH, Stepped, offer_ring, write_like_libxl
from xenbackend import log
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor import events
from xenbackend.supervisor.settings import Settings
from xenbackend.supervisor.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The log of the test."""
    stream = io.StringIO()
    log.configure("journal", "info", stream)
    yield stream
    structlog.reset_defaults()


def test_write_for_a_state_that_has_passed_is_dropped(stepped: Stepped, toolstack: Store) -> None:
    """A write is made only where the state is still the one it was decided on, and another look follows."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "2")
    vbd.node_changed = False
    vbd._write(events.Write({"state": "4", "sectors": "8"}, XenbusState.CLOSING))

    assert vbd.node_changed
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_write_into_a_node_that_is_gone_does_not_make_it_again(stepped: Stepped, toolstack: Store) -> None:
    """A directory that the toolstack has removed stays removed, whatever we had still to say."""
    write_like_libxl(toolstack)
    vbd = stepped.vbd()
    toolstack.remove(PATH.backend)
    vbd._write(events.Write({"state": "2"}, XenbusState.INITIALISING))

    assert toolstack.read_optional(PATH.backend) is None


def test_lines_that_a_guest_provokes_are_bounded(stepped: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """R13: a frontend that toggles its state for ever fills no log."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    for number in range(300):
        toolstack.write(f"{PATH.frontend}/state", "6" if number % 2 else "1")
        stepped.turn(0)

    assert 10 < len(lines.getvalue().splitlines()) < 60


def test_the_worker_hears_what_was_offered(
    xenstored: Xenstored, toolstack: Store, guest: Store, lines: io.StringIO
) -> None:
    """The limits of the settings, and a disk that cannot discard, reach the worker that has to enforce them."""
    stepped = Stepped(xenstored.address, Settings(limits=Limits(max_segments=32)))
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    stepped.close()

    assert "discard=False segments=32" in lines.getvalue()


@pytest.mark.parametrize(("type_", "exports"), [("hvm", True), ("pv", False), ("", False)])
def test_disks_of_hvm_guests_are_exported(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, type_: str, *, exports: bool
) -> None:
    """Only their firmware boots from a disk before their own driver does; and only until that has connected."""
    if type_:
        toolstack.write("/libxl/5/type", type_)
    stepped = Stepped(xenstored.address, Settings(socket=str(tmp_path / "control.sock")))
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    where = toolstack.read_optional(f"{PATH.backend}/physical-device-path")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")

    assert (f"nbd+unix:///?socket={tmp_path}/nbd/vbd-5-51712.sock" if exports else None) == where
    assert toolstack.read_optional(f"{PATH.backend}/physical-device-path") is None
    assert not stepped.vbd()._export_path()
    stepped.close()
