"""Many disks on one service: attached, loaded at once, detached, with nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest_ring import Submitted
from xenbackend.rig.pattern import DiskModel, Step
from xenbackend.supervisor.service import openers
from xenbackend.supervisor.xenstore.paths import VbdPath

GUESTS = 10
DISKS_EACH = 5
SECTORS = 2048
ROUNDS = 25
DEPTH = 4

ZYGOTES = 1


class LoadedDisk:
    """A vbd with a model of its expected contents."""

    def __init__(self, path: VbdPath, frontend: Frontend, seed: int) -> None:
        self.path = path
        self.frontend = frontend
        self.model = DiskModel(seed, SECTORS, Random(seed), (BLKIF_OP_READ, BLKIF_OP_WRITE))
        self.in_flight: list[tuple[Submitted, Step]] = []
        self.done = 0

    def push(self) -> None:
        """Submit requests until DEPTH are in flight."""
        while len(self.in_flight) < DEPTH and (step := self.model.next_step()) is not None:
            request = self.frontend.submit(step.operation, step.sector, step.count, step.data)
            self.in_flight.append((request, step))

    def reap(self) -> None:
        """Wait for all requests, and verify them."""
        self.frontend.wait([request for request, _ in self.in_flight])
        for request, step in self.in_flight:
            assert request.status is not None
            self.model.finish(step, request.status, request.data)
        self.done += len(self.in_flight)
        self.in_flight = []


def _descriptors_after_an_answer(machine: Machine) -> int:
    """Return the service's descriptors; our own connection may still be one of them."""
    machine.ask({"verb": "ping"})
    return len(list(Path(f"/proc/{machine.service_pid}/fd").iterdir()))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_for_zygote(machine: Machine) -> None:
    until(lambda: len(_children(machine.service_pid)) == ZYGOTES, "no zygote is there")


@pytest.mark.slow
def test_fifty_disks_are_served_at_once_and_leave_nothing(tmp_path: Path) -> None:
    """50 vbds attach, run verified load at once and detach on one service; no process, descriptor, page, port or node
    of them is left.
    """
    with Machine() as machine:
        _wait_for_zygote(machine)
        descriptors = min(_descriptors_after_an_answer(machine) for _ in range(20))
        nodes = machine.xenstored.dump()
        guests = [machine.create_guest(domid, pages=4096) for domid in range(1, GUESTS + 1)]
        disks: list[LoadedDisk] = []
        for guest in guests:
            for number in range(DISKS_EACH):
                image = tmp_path / f"{guest.domid}-{number}.img"
                image.write_bytes(bytes(SECTORS * 512))
                path = machine.attach(guest.domid, f"xvd{'abcde'[number]}", f"log:|aio:{image}")
                frontend = guest.connect(path, Wishes(persistent=number % 2 == 0, queues=1 + number % 2))
                disks.append(LoadedDisk(path, frontend, len(disks)))
        assert len(machine.ask({"verb": "status"})["data"]) == GUESTS * DISKS_EACH
        for _ in range(ROUNDS):
            for disk in disks:
                disk.push()
            for disk in disks:
                disk.reap()
        counters = [vbd["counters"] for vbd in machine.ask({"verb": "status"})["data"]]
        for disk in disks:
            disk.frontend.close()
            machine.detach(disk.path)
        for guest in guests:
            guest.close()
            machine.store.remove(f"/local/domain/{guest.domid}")
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up:  # wait for the last workers' messages and our connection's end
            left = _descriptors_after_an_answer(machine)
            new = {path for path, _ in machine.xenstored.dump()} - {path for path, _ in nodes}
            status = {path for path in new if path.startswith("/local/domain/0/xenbackend/vbd/")}
            if len(_children(machine.service_pid)) == ZYGOTES and left <= descriptors and not status:
                break

        assert {value["errors"] + value["guest_errors"] + value["bugs"] for value in counters} == {0}
        assert {"mappings": 0, "pins": 0, "ports": 0} == machine.xen.held()
        assert ZYGOTES == len(_children(machine.service_pid))
        assert left <= descriptors
        assert set() == {path for path in new if "/libxl" not in path or "vbd" in path}


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGHUP, signal.SIGKILL], ids=["replaced", "killed"])
def test_workers_that_die_together_have_successors(tmp_path: Path, signal_number: signal.Signals) -> None:
    """More workers are killed at once than openers work at a time, and the service is replaced or killed while some
    wait: every guest gets its answer.
    """
    count = openers.MOST + 6
    with Machine() as machine:
        guest = machine.create_guest(5, pages=4096)
        frontends = []
        for number in range(count):
            image = tmp_path / f"{number}.img"
            image.write_bytes(bytes(SECTORS * 512))
            path = machine.attach(5, f"xvd{chr(ord('a') + number)}", f"aio:{image}")
            frontends.append(guest.connect(path, Wishes()))
        workers = [vbd["worker"] for vbd in machine.ask({"verb": "status"})["data"]]
        service = machine.service_pid
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        reads = [frontend.submit(BLKIF_OP_READ, 0, 8) for frontend in frontends]
        for frontend in frontends:
            frontend.poll()
        if signal_number == signal.SIGKILL:
            os.kill(service, signal.SIGKILL)
        else:
            machine.replace_service()
        for frontend, read in zip(frontends, reads, strict=True):
            frontend.wait([read], 60)

        assert {0} == {read.status for read in reads}
        for frontend in frontends:
            frontend.close()
        guest.close()
