"""A real systemd restarts the service with other settings below a disk in service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.tools.command import run
from tests.xen.tools.disks import blank
from tests.xen.tools.service import UNIT, Service, attached
from xenbackend.protocol.client import DEFAULT_SOCKET, call

SETTINGS = Path("/etc/xenbackend.toml")
MOVED = "/run/xenbackend/moved.sock"


@pytest.fixture
def worker(the_service: Service, on_tmpfs: Path) -> Iterator[int]:
    """The worker of a disk of dom0; the settings are restored before the disk is detached."""
    text = SETTINGS.read_text()
    with attached(0, "xvdq", f"log:|aio:{blank(on_tmpfs / 'disk.raw', 16)}", "--wait"):
        yield the_service.disk(0, "xvdq")["worker"]
        SETTINGS.write_text(text)
        the_service.restart()


def _worker_after_restart(the_service: Service, socket: str) -> int:
    """Restart, write to the disk, and return the worker that serves it."""
    the_service.restart()
    run("dd", "if=/dev/zero", "of=/dev/xvdq", "bs=64k", "count=16", "oflag=direct")
    return int(call(socket, {"verb": "status"}).data[0]["worker"])


def test_a_mistake_costs_no_disk(the_service: Service, worker: int) -> None:
    """With broken settings the same worker serves on by the former ones, and systemd shows the mistake."""
    SETTINGS.write_text("frob = 1\n")
    workers = [_worker_after_restart(the_service, DEFAULT_SOCKET) for _ in range(2)]
    said = run("systemctl", "show", "--property=StatusText", "--value", UNIT).out

    assert [worker, worker] == workers
    assert f"serving 1 vbds by the former service's settings: {SETTINGS}:1: there is no setting frob" in said


def test_a_control_socket_that_is_moved(the_service: Service, worker: int) -> None:
    """The next service listens at the new socket, and so does the one after it."""
    SETTINGS.write_text(f'socket = "{MOVED}"\n')

    assert [worker, worker] == [_worker_after_restart(the_service, MOVED) for _ in range(2)]
