"""What a test could leave behind: everything that a disk takes while it is served, counted before and after.

Must not clean up: what was left is told, and the next test begins from there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.xen.tools import xenstore
from tests.xen.tools.command import Failed, run, until, xl
from tests.xen.tools.service import UNIT

SETTLE_S = 30.0
CGROUP = Path("/sys/fs/cgroup/system.slice")
LSEVTCHN = next(Path("/usr/lib").glob("xen-*/bin/lsevtchn"), Path("lsevtchn"))
_OURS = re.compile(r"xenbackend|^xl |qemu-system|^fio ")
_PAGE = 4096
_STAY = {"/vm", "/libxl", "/libxl/0"}  # made by xl with the first guest or disk
Snapshot = dict[str, Counter[str]]  # per kind: how many of each


def snapshot() -> Snapshot:
    """Return what there is now."""
    return {
        "domain": Counter(_domains()),
        "process": Counter(_processes()),
        "page mapped by grant": Counter(_mapped_pages()),
        "event channel": Counter(_event_channels()),
        "descriptor of the service": Counter(_descriptors(_service())),
        "block device": Counter(_block_devices()),
        "xenstore node": Counter(xenstore.tree("/").keys() - _STAY),
    }


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Return a line for each thing that is there more or less often than before."""
    lines = []
    for kind, former in before.items():
        lines += [f"left: {count} x {kind}: {what}" for what, count in (after[kind] - former).items()]
        lines += [f"gone: {count} x {kind}: {what}" for what, count in (former - after[kind]).items()]
    return lines


def wait_until_same(before: Snapshot) -> list[str]:
    """Return the differences that do not go away by themselves."""
    with suppress(Failed):
        until("all is as before", lambda: not differences(before, snapshot()), SETTLE_S)
    return differences(before, snapshot())


def _domains() -> list[str]:
    return [line.split()[0] for line in xl("list").out.splitlines()[1:]]


def _processes() -> Iterator[str]:
    """Yield the command lines of our processes and of those that serve guests, numbers left out."""
    for process in _all_processes():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if _OURS.search(words) and "pytest" not in words:
                yield re.sub(r"\d+", "#", words.strip())


def _mapped_pages() -> Iterator[str]:
    """Yield the name of a process for each page that it has mapped by a grant."""
    for process in _all_processes():
        with suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                if line.endswith("/dev/xen/gntdev"):
                    start, end = (int(each, 16) for each in line.split()[0].split("-"))
                    yield from [(process / "comm").read_text().strip()] * ((end - start) // _PAGE)


def _event_channels() -> list[str]:
    """Return one word per inter-domain channel of dom0: the other domain."""
    return re.findall(r"Remote Domain (\d+)", run(LSEVTCHN, "0").out)


def _service() -> int:
    """Return the service's process, 0 where there is none; to ask systemctl takes a fifth of a second."""
    with suppress(OSError):
        for pid in (CGROUP / UNIT / "cgroup.procs").read_text().split():
            with suppress(OSError):
                if "\nPPid:\t1\n" in Path(f"/proc/{pid}/status").read_text():  # the others are its children
                    return int(pid)
    return 0


def _descriptors(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield re.sub(r"\d+", "#", str(descriptor.readlink()))


def _block_devices() -> Iterator[str]:
    for device in Path("/sys/block").iterdir():
        backing = device / "loop/backing_file"
        if not device.name.startswith("loop"):
            yield device.name
        elif backing.exists():
            yield f"{device.name} on {backing.read_text().strip()}"


def _all_processes() -> Iterator[Path]:
    return (each for each in Path("/proc").iterdir() if each.name.isdecimal())
