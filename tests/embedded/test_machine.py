"""The embedded host: it boots, serves, and leaves nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from xenbackend.embedded.machine import Machine
from xenbackend.errors import ChainError, XenbackendError
from xenbackend.rig.frontend import Wishes


@pytest.mark.slow
def test_a_guest_reads_what_it_wrote_and_nothing_is_left(tmp_path: Path) -> None:
    """A disk is attached, used and detached; the file holds what the guest wrote; directory and service are gone."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine:
        pid, directory = machine.service_pid, machine.directory
        guest = machine.create_guest(3)
        path = machine.attach(3, "xvdb", f"log:|aio:{image}")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"x" * 4096)
        read = frontend.read(8, 8)
        frontend.flush()
        ranges = machine.written_ranges("3/xvdb")
        frontend.close()
        machine.detach(path)
        guest.close()

        assert read == b"x" * 4096
        assert ranges == [(8, 8)]
        assert machine.xen.held() == {"mappings": 0, "pins": 0, "ports": 0}
    assert image.read_bytes()[4096:8192] == b"x" * 4096
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_mistakes_are_told_in_sentences() -> None:
    """A chain that cannot be, and an image that is not there, are refused in words, and nothing is left of them."""
    with Machine() as machine:
        guest = machine.create_guest(1)
        with pytest.raises(ChainError, match="unknown driver"):
            machine.attach(1, "xvda", "nosuch:x")
        with pytest.raises(XenbackendError, match="there is no file or device /nonexistent"):
            machine.attach(1, "xvda", "aio:/nonexistent")
        guest.close()
        give_up = time.monotonic() + 10
        while "/51712" in str(machine.xenstored.dump()) and time.monotonic() < give_up:
            machine.ask({"verb": "ping"})  # the service tidies up after the last step that a toolstack waits for

        assert "/51712" not in str(machine.xenstored.dump())


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The service's own last words are in the error."""
    machine = Machine(log=tmp_path / "log")
    machine.control = str(tmp_path / ("x" * 200))
    with pytest.raises(XenbackendError, match="the service did not start: "), machine:
        pass

    assert not machine.directory.exists()
