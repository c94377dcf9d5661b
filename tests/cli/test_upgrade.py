"""`xenbackend stop`; `upgrade` is tried beside the other commands for disks in service."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes


@pytest.mark.slow
def test_stop_ends_everything_in_order(tmp_path: Path) -> None:
    """Nothing serves the disk afterwards, nothing of the guest's is mapped, and the next service serves it on."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes(persistent=True))
        frontend.write(0, b"a" * 4096)
        status = main(["stop", "--socket", machine.control])
        assert machine.service is not None
        ended = machine.service.wait(20)
        held = machine.xen.held()
        machine.start_service()
        frontend.write(8, b"b" * 4096)

        assert (0, 0) == (status, ended)
        assert 0 == held["mappings"]
        frontend.close()
