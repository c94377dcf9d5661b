"""What ends out of turn: a worker, the service, the host below them; nothing keeps a disk that nobody serves."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

PATIENCE_S = 20.0  # for what must happen; a failed test takes this long, a passed one does not
_PAGE = 4096
_DYING_HOST = """
import os, signal
from pathlib import Path
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

machine = Machine().__enter__()
guest = machine.create_guest(5)
for number, vdev in enumerate(("xvda", "xvdb")):
    frontend = guest.connect(machine.attach(5, vdev, "ram:1M"), Wishes(persistent=bool(number)))
    frontend.write(0, bytes(4096))
children = Path(f"/proc/{machine.service_pid}/task/{machine.service_pid}/children").read_text()
print(machine.directory, machine.service_pid, children, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it never happened"


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_replaced(tmp_path: Path) -> None:
    """A worker killed under load takes its disk down with a sentence; detached and attached again it works, and the
    image is free all the while.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:

        def told() -> str:
            return str(machine.ask({"verb": "status"})["data"][0]["error"])

        path = machine.attach(5, "xvda", f"aio:{image}")
        frontend = guest.connect(path, Wishes(persistent=True))
        frontend.write(0, b"a" * _PAGE)
        for number in range(16):
            frontend.submit(BLKIF_OP_WRITE, 8 + 8 * number, data=b"b" * _PAGE)
        os.kill(machine.ask({"verb": "status"})["data"][0]["worker"], signal.SIGKILL)
        _until(told)
        assert "the worker was ended by SIGKILL" == told()
        frontend.crash()
        machine.detach(path)
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes())

        assert b"a" * _PAGE == frontend.read(0, 8)
        frontend.close()


@pytest.mark.slow
def test_the_dirty_map_outlives_the_worker(tmp_path: Path) -> None:
    """A worker killed with marks in its map has a successor, once the guest's driver begins anew, that knows them."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"log:|aio:{image}")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"a" * _PAGE)
        os.kill(machine.ask({"verb": "status"})["data"][0]["worker"], signal.SIGKILL)
        _until(lambda: machine.ask({"verb": "status"})["data"][0]["error"])
        frontend.crash()
        frontend = guest.connect(path, Wishes())
        frontend.write(64, b"b" * _PAGE)

        assert b"a" * _PAGE == frontend.read(8, 8)
        assert [(8, 8), (64, 8)] == machine.written_ranges("5/xvda")
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
def test_a_map_that_is_lost_says_that_all_is_dirty(tmp_path: Path) -> None:
    """The next service does not have the map of the one before: for a disk in use it must not say that all is clean."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"log:|aio:{image}")
        fresh = machine.written_ranges("5/xvda")
        frontend = guest.connect(path, Wishes())
        frontend.write(8, b"a" * _PAGE)
        machine.stop_service()
        machine.start_service()
        frontend.write(64, b"b" * _PAGE)

        assert [] == fresh
        assert [(0, 2048)] == machine.written_ranges("5/xvda")
        frontend.close()
        machine.detach(path)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_next_service_goes_on_with_the_same_rings(is_killed: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """A service that was stopped or killed with requests in the ring has a successor that answers them all."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes(queues=2, persistent=True))
        frontend.write(0, b"a" * _PAGE)
        if is_killed:
            assert machine.service is not None
            machine.service.kill()
            machine.service.wait()
        else:
            machine.stop_service()
        requests = [frontend.submit(BLKIF_OP_WRITE, 8 * n, data=bytes([n]) * _PAGE) for n in range(32)]
        machine.start_service()
        frontend.wait(requests, PATIENCE_S)

        assert {0} == {request.status for request in requests}
        assert [bytes([n]) * _PAGE for n in range(32)] == [frontend.read(8 * n, 8) for n in range(32)]
        frontend.close()


@pytest.mark.slow
def test_the_next_service_does_not_go_on_with_a_paused_disk(tmp_path: Path) -> None:
    """After a failed flush the operator is told; a service that stops closes the disk, and its successor leaves it."""
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:

        def known() -> dict[str, Any]:
            return dict(machine.ask({"verb": "status"})["data"][0])

        frontend = guest.connect(machine.attach(5, "xvda", f"fault:op=flush|aio:{image}"), Wishes())
        frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
        _until(lambda: known()["error"])
        paused = known()
        machine.stop_service()
        machine.start_service()
        _until(lambda: known()["phase"] == "open")

        assert ("Connected", "a flush failed (EIO); the disk is paused") == (paused["state"], paused["error"])
        assert "Closed" == known()["state"]
        frontend.crash()


@pytest.mark.slow
def test_no_worker_outlives_its_service_although_the_host_refuses() -> None:
    """Where neither grants nor ports can be given back any more, a worker closes its chain and ends all the same."""
    host = subprocess.run([sys.executable, "-c", _DYING_HOST], capture_output=True, text=True, check=False)
    directory, service, *workers = host.stdout.split()
    shutil.rmtree(directory)
    ends = [os.pidfd_open(int(worker)) for worker in workers]
    os.kill(int(service), signal.SIGKILL)
    ended = [end for end in ends if select.select([end], [], [], PATIENCE_S)[0]]
    for end in set(ends) - set(ended):
        signal.pidfd_send_signal(end, signal.SIGKILL)
    for end in ends:
        os.close(end)

    assert (2, 2) == (len(workers), len(ended))
