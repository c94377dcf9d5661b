"""Disks whose workers are behind all walls: whatever has to be opened is opened by an opener."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes
from xenbackend.walls.raising import Wall

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="only root raises all walls")]
DATA = b"d" * 4096


@pytest.mark.rows("R20")
def test_a_disk_is_served_snapshotted_and_succeeded_behind_walls(tmp_path: Path) -> None:
    """A disk behind all walls is attached with a record, refused to another guest, and snapshotted; its worker dies."""
    image, leaf = tmp_path / "disk", tmp_path / "leaf"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest, closing(machine.create_guest(6)):
        disk = guest.connect(machine.attach(5, "xvda", f"log:{tmp_path}/record|aio:{image}"), Wishes())
        disk.write(0, DATA)
        with pytest.raises(XenbackendError, match=r"is locked by the disk 5/xvda \(process \d+\)"):
            machine.attach(6, "xvda", f"aio:{image}")
        machine.ask({"verb": "snapshot", "vbd": "5/xvda", "file": str(leaf), "format": "qcow2"})
        disk.write(8, DATA)
        before = _known(machine)
        os.kill(before["worker"], signal.SIGKILL)
        until(lambda: _known(machine)["restarts"] == 1 and _known(machine)["phase"] == "serving")
        read = disk.read(0, 16)
        after = _known(machine)

    assert 2 * DATA == read
    assert leaf.stat().st_size > len(DATA)
    for known in (before, after):
        assert ({}, []) == (known["no_walls"], known["needs"])
        assert {wall.value for wall in Wall} - {*known["walls"]} <= {"processes"}, "which a worker by exec has not"


def _known(machine: Machine) -> dict[str, Any]:
    """Return what is known of guest 5's disk."""
    [found] = [each for each in machine.ask({"verb": "status"})["data"] if each["vbd"] == "5/xvda"]
    return dict(found)
