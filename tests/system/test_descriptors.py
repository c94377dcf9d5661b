"""A program started by any process of a service would inherit nothing but the standard streams."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.qemu import qemu_img
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes

CHAIN = "log:{0}/record|qcow2:{0}/image"
pytestmark = pytest.mark.slow  # processes


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A host whose service is kept by its parent."""
    with Machine() as machine:
        yield machine


def family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from family(int(child))


def inherited(pid: int) -> list[str]:
    """Return the descriptors of a process that stay open at exec, without the standard streams."""
    left = []
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            flags = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith("flags:"))
            name = str(Path(f"/proc/{pid}/fd/{info.name}").readlink())
        except FileNotFoundError:  # closed in the meantime
            continue
        if int(info.name) > 2 and not int(flags, 8) & os.O_CLOEXEC:
            left.append(name)
    return left


def command(pid: int) -> str:
    """Return a process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def worker_of(machine: Machine) -> int:
    """Return the number of the one worker."""
    return int(machine.ask({"verb": "status"})["data"][0]["worker"])


def wait_for_another(machine: Machine, service: int) -> None:
    """Return when another service than this process answers."""
    while True:
        with suppress(XenbackendError):
            if machine.service_pid != service:
                return


def test_no_process_hands_a_descriptor_on(machine: Machine, tmp_path: Path) -> None:
    """Parent, service, zygote and worker have close-on-exec set on every descriptor, also after an upgrade.

    The guest has rings, an exported disk's socket, memories, a record's file and an image.
    """
    qemu_img("create", "-q", "-f", "qcow2", f"{tmp_path}/image", "8M")
    machine.store.write("/libxl/5/type", "hvm")
    guest = machine.create_guest(5)
    frontend = guest.connect(machine.attach(5, "xvda", CHAIN.format(tmp_path)), Wishes(queues=2, persistent=True))
    frontend.write(0, b"x" * 4096)
    first = machine.service_pid
    os.kill(worker_of(machine), signal.SIGKILL)
    frontend.read(0, 8)
    machine.replace_service()
    wait_for_another(machine, first)
    frontend.read(0, 8)
    assert machine.service is not None
    give_up = time.monotonic() + 10
    found: dict[int, tuple[str, list[str]]] = {}
    while time.monotonic() < give_up:
        with suppress(FileNotFoundError, ProcessLookupError):  # an opener that has just ended
            pids = {*family(machine.service.pid), worker_of(machine)}  # the worker is not a child of this service
            found = {pid: (command(pid), inherited(pid)) for pid in pids}
            if len(found) == 4 and not any(fds for _, fds in found.values()):  # else wait: a zygote is still starting
                break
    frontend.close()
    guest.close()

    assert len(found) == 4, found  # parent, service, zygote, worker
    assert {pid: (name, []) for pid, (name, _) in found.items()} == found
