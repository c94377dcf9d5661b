"""The walls around workers of this dom0, whose kernel, libc and Python may be newer than the policy."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.xen.tools.command import run, until, xenbackend
from tests.xen.tools.disks import blank
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import verify
from tests.xen.tools.service import Service, attached
from xenbackend.walls.raising import Wall

TOLD_OFF = ("clone3(",)  # glibc falls back to clone, whose flags a filter can examine
THERE = "until [ -b /dev/xvdb ]; do sleep 0.1; done"


def zygote(service: Service) -> int:
    """Return the process from which workers are forked."""
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"zygote" in Path(f"/proc/{pid}/cmdline").read_bytes())


@contextmanager
def traced(pid: int, file: Path) -> Iterator[None]:
    """Record the system calls that fail in a process and all that it forks, while the block lasts."""
    command = ["strace", "-f", "-qq", "-e", "status=failed", "-o", str(file), "-p", str(pid)]
    with subprocess.Popen(command) as strace:
        try:
            until("strace has the process", lambda: tracer(pid) == strace.pid)
            yield
        finally:
            strace.terminate()


def tracer(pid: int) -> int:
    """Return the process that traces another one (proc_pid_status(5))."""
    found = re.search(r"^TracerPid:\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def test_all_walls_are_up(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """A guest's worker and its successor are behind every wall that there is."""
    with attached(linux.domid, "xvdb", f"log:|aio:{blank(on_ext4 / 'disk.raw', 16)}", "--wait"):
        first = the_service.disk(linux.domid, "xvdb")
        run("kill", "-KILL", first["worker"])
        until(
            "another worker serves",
            lambda: the_service.disk(linux.domid, "xvdb")["worker"] not in (0, None, first["worker"]),
        )
        until("it serves", lambda: the_service.disk(linux.domid, "xvdb")["phase"] == "serving")
        second = the_service.disk(linux.domid, "xvdb")

    for each in (first, second):
        assert ({wall.value for wall in Wall}, {}, []) == ({*each["walls"]}, each["no_walls"], each["needs"])


def test_a_worker_is_refused_nothing_that_it_uses(linux: Guest, on_ext4: Path, the_service: Service) -> None:
    """Whatever its disk goes through, no system call of a worker or its openers is refused.

    So the worker's own filter and that of the systemd unit have all calls of this libc and this Python.
    """
    image, leaf, file = blank(on_ext4 / "disk.raw", 32), on_ext4 / "leaf.qcow2", on_ext4 / "calls"
    vbd = f"{linux.domid}/xvdb"
    with traced(zygote(the_service), file):
        with attached(linux.domid, "xvdb", f"aio:{image}", "--wait"):
            linux.run(f"{THERE}; {verify('/dev/xvdb', '1m')}")
            xenbackend("set", vbd, f"log:|delay:read=1ms|aio:{image}")
            xenbackend("snapshot", vbd, leaf)
            linux.run(verify("/dev/xvdb", "1m") + " && blkdiscard /dev/xvdb || true")
            xenbackend("log", "get", vbd)
            xenbackend("upgrade", vbd)
            linux.run(verify("/dev/xvdb", "1m"))
        until("the service has let go", lambda: not the_service.disks())
    calls = [line for line in file.read_text().splitlines() if not line.partition(" ")[2].lstrip().startswith(TOLD_OFF)]
    refused = [line for line in calls if " EPERM " in line or " ENOSYS " in line]

    assert [] == refused
