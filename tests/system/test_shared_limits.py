"""Disks that share one limit, with a real service, workers and guests."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Frontend, Wishes

pytestmark = pytest.mark.slow
IOPS = 40  # few, so that a busy host can do them


class Guest(threading.Thread):
    """Reads one sector after the other until it is ended; `done` counts the reads."""

    def __init__(self, frontend: Frontend) -> None:
        super().__init__()
        self.frontend = frontend
        self.done = 0
        self.ends = False
        self.start()

    def run(self) -> None:
        """Read."""
        while not self.ends:
            self.frontend.read(0, 1)
            self.done += 1

    def end(self) -> None:
        """Stop reading."""
        self.ends = True
        self.join()


def rates(guests: list[Guest], seconds: float) -> list[float]:
    """Return each guest's reads per second."""
    begun, before = time.monotonic(), [each.done for each in guests]
    threading.Event().wait(seconds)
    took = time.monotonic() - begun
    return [(each.done - former) / took for each, former in zip(guests, before, strict=True)]


def test_two_disks_share_a_limit(tmp_path: Path) -> None:
    """Two disks stay within their common limit and share it evenly, also after a worker and the service are killed; one
    alone gets almost all of it.
    """
    with Machine(log=tmp_path / "log") as machine, ExitStack() as opened:
        guests: list[Guest] = []
        names = []
        for number in (5, 6):
            (tmp_path / f"{number}.raw").write_bytes(bytes(1 << 20))
            guest = opened.enter_context(closing(machine.create_guest(number)))
            path = machine.attach(number, "xvda", f"throttle:iops={IOPS},group=tenant|aio:{tmp_path}/{number}.raw")
            frontend = guest.connect(path, Wishes())
            opened.callback(frontend.crash)
            guests.append(Guest(frontend))
            opened.callback(guests[-1].end)
            names.append(path.disk)

        def shares() -> list[float]:
            layers = [machine.ask({"verb": "status", "vbd": each})["data"][0]["layers"][:1] for each in names]
            return [each[0]["figures"].get("share_ppm", 0) / 1e6 if each else 0.0 for each in layers]

        until(lambda: all(0.45 < each < 0.55 for each in shares()), shares)
        found = rates(guests, 3)
        assert sum(found) < 1.2 * IOPS
        assert min(found) > 0.25 * IOPS
        for pid in (machine.ask({"verb": "status", "vbd": names[0]})["data"][0]["worker"], machine.service_pid):
            os.kill(pid, signal.SIGKILL)
        until(lambda: all(0.45 < each < 0.55 for each in shares()), shares)
        until(lambda: min(rates(guests, 1)) > 0.25 * IOPS, shares)
        assert sum(rates(guests, 2)) < 1.2 * IOPS
        guests[1].end()
        until(lambda: shares()[0] > 0.9, shares)
        assert rates(guests[:1], 2)[0] > 0.7 * IOPS
