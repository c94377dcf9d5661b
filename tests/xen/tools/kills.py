"""What serves a guest's xvdb is killed, and what tells that the guest has noticed.

Must not start a worker anew: that is for the service.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, until
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import Load
from tests.xen.tools.service import Service

AT_ONCE = 5  # as soon as it serves, before it is let do anything: nobody follows a seventh that died in vain
_XVDB = 51728
_COMPLAINTS = ("I/O error", "disabled for further use", "lost async page write", "critical")


def complaints(guest: Guest, since: int) -> list[str]:
    """Return what the guest's kernel has printed since then that tells of a disk in trouble."""
    return [line for line in guest.log[since:].splitlines() if any(each in line for each in _COMPLAINTS)]


def wait_until_served(guest: Guest, *, but_not_by: str = "") -> str:
    """Return the process that serves xvdb, once another one than `but_not_by` does."""

    def look() -> str:
        worker = _shown(guest, "worker")
        return worker if _shown(guest, "phase") == "serving" and worker not in ("", but_not_by) else ""

    return until("xvdb is served", look)


def kill(*pids: int | str) -> None:
    """Kill processes at once."""
    run("kill", f"-{int(signal.SIGKILL)}", *pids)


def deaths(load: Load, service: Service, count: int) -> Iterator[str]:
    """Kill so many workers below a load of xvdb, one after the other, and yield each successor once it serves.

    Of `AT_ONCE` one is killed after it has served the load, and the others as soon as they serve.
    """
    for number in range(count):
        former = wait_until_served(load.guest)
        if number % AT_ONCE == 0:
            load.wait_until_it_writes(service)
        kill(former)
        yield wait_until_served(load.guest, but_not_by=former)


def _shown(guest: Guest, key: str) -> str:
    """Return what xenstore says of the guest's xvdb; cheaper than to ask the service."""
    return xenstore.read(f"/local/domain/0/xenbackend/vbd/{guest.domid}/{_XVDB}/{key}") or ""
