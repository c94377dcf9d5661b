"""The service in dom0, as systemd runs it.

Must not ask for anything that an operator cannot.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.xen.tools.command import run, until, xenbackend
from xenbackend.protocol.client import DEFAULT_SOCKET, call

UNIT = "xenbackend.service"


class Service:
    """The running service."""

    @property
    def pid(self) -> int:
        """The supervisor's process; 0 while there is none."""
        return int(run("systemctl", "show", "--property=MainPID", "--value", UNIT).out)

    def is_active(self) -> bool:
        """Return whether systemd takes it for started."""
        return run("systemctl", "is-active", "--quiet", UNIT, check=False).status == 0

    def start(self) -> None:
        """Start it; it serves when this returns (Type=notify)."""
        run("systemctl", "start", UNIT)

    def stop(self) -> None:
        """Stop it; it has drained when this returns."""
        run("systemctl", "stop", UNIT)

    def restart(self) -> None:
        """Stop and start it."""
        run("systemctl", "restart", UNIT)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Kill the supervisor alone, and return when systemd has started another."""
        former = self.pid
        run("kill", f"-{int(number)}", former)
        until("systemd starts another service", lambda: self.is_active() and self.pid not in (0, former))

    def disks(self) -> list[dict[str, Any]]:
        """Return what `xenbackend status --json` prints, without the second that starting it takes here."""
        return call(DEFAULT_SOCKET, {"verb": "status"}).data

    def disk(self, domid: int, vdev: str) -> dict[str, Any]:
        """Return what is known of one disk. Raises: StopIteration where it is not served."""
        return next(each for each in self.disks() if (each["domid"], each["device"]) == (domid, vdev))


@contextmanager
def attached(domid: int, vdev: str, chain: str, *options: str) -> Iterator[None]:
    """Give a domain a disk with `xenbackend attach`, and take it away again; after a failure whatever it takes."""
    xenbackend("attach", domid, vdev, chain, *options)
    try:
        yield
    except BaseException:
        xenbackend("detach", domid, vdev, "--force", check=False)
        raise
    xenbackend("detach", domid, vdev)


def journal(since: float) -> str:
    """Return what the service and its workers have logged since a time (`time.time()`)."""
    return run("journalctl", "--no-pager", "--output=cat", f"--unit={UNIT}", f"--since=@{since:.3f}").out


def now() -> float:
    """Return the time that `journal` takes."""
    return time.time()
