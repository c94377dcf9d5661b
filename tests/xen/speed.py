"""How fast our service is compared with xen-blkback and QEMU's qdisk, through dom0's own blkfront, in one boot.

Must not judge times: everything is 20 to 50 times slower than on real hardware, and only ratios mean anything. Counts
of calls are the same as there, so those have goals. Not part of the suite; `make bench-xen` runs it and leaves
`speed.txt`, `speed.json` and `counts.txt` with the other results.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, until, xl
from tests.xen.tools.counts import EVENT_CHANNEL_OP, GRANT_TABLE_OP, Counts, counted
from tests.xen.tools.service import Service, attached

DEVICE = Path("/dev/xvdq")
OUT = Path("/parcel/out")
QEMU_PID = Path("/run/xen/speed-qemu.pid")
ROUNDS, SECONDS = int(os.environ.get("ROUNDS", "3")), 2
SIZE_MIB = 64
QEMU = "/usr/libexec/xen-qemu-system-i386"
LOADS = {
    "4K randread QD1": ("randread", "4k", 1),
    "4K randwrite QD1": ("randwrite", "4k", 1),
    "4K randread QD32": ("randread", "4k", 32),
    "4K randwrite QD32": ("randwrite", "4k", 32),
    "1M read": ("read", "1m", 4),
    "1M write": ("write", "1m", 4),
}
Rates = dict[tuple[str, str, str], list[float]]  # place, backend, load -> requests/s of each round


@contextmanager
def by_xl(line: str) -> Iterator[None]:
    """Attach a disk to dom0 with xl, while the block lasts."""
    xl("block-attach", 0, line)
    try:
        until("blkfront shows the disk", DEVICE.is_block_device)
        yield
    finally:
        xl("block-detach", 0, "xvdq")
        until("blkfront has let the disk go", lambda: not DEVICE.exists())


@pytest.fixture
def _dom0_qemu() -> Iterator[None]:
    """Run QEMU as the backend of dom0's own disks, which Xen's init script starts on most hosts."""
    QEMU_PID.parent.mkdir(exist_ok=True)
    run(
        *(QEMU, "-xen-domid", "0", "-xen-attach", "-name", "dom0", "-M", "xenpv", "-daemonize", "-nographic"),
        *("-nic", "none"),  # else it makes a network device for dom0, and leaves its nodes in xenstore
        *("-monitor", "/dev/null", "-serial", "/dev/null", "-parallel", "/dev/null", "-pidfile", QEMU_PID),
    )
    pid = QEMU_PID.read_text().strip()
    xenstore.write("/local/domain/0/image/device-model-pid", pid)  # tells libxl that it runs
    yield
    run("kill", pid)
    xenstore.remove("/local/domain/0/image")
    xenstore.remove("/local/domain/0/backend/qdisk")
    xenstore.remove("/local/domain/0/backend/console")


BACKENDS: dict[str, Callable[[Path], object]] = {
    "blkback": lambda image: by_xl(f"format=raw,vdev=xvdq,access=rw,target={image}"),
    "qdisk": lambda image: by_xl(f"format=raw,backendtype=qdisk,vdev=xvdq,access=rw,target={image}"),
    "aio:": lambda image: attached(0, "xvdq", f"aio:{image}"),
    "log:|aio:": lambda image: attached(0, "xvdq", f"log:|aio:{image}"),
    "aio:,cache=on": lambda image: attached(0, "xvdq", f"aio:{image},cache=on"),  # like blkback and qdisk
}
COUNTED = ("blkback", "qdisk", "aio:", "log:|aio:")
COUNTED_LOADS = ("4K randread QD1", "4K randwrite QD1", "4K randread QD32", "4K randwrite QD32")
CLOCK = "clock_gettime"
# At depth 1: to sleep, to read and enable the event channel, to copy, and to notify. Under emulation the frontend is
# never back before the worker gives up looking, which would save the first three. A write looks for a file cut off.
MOST_CALLS = {"4K randread QD1": 5, "4K randwrite QD1": 6, "4K randread QD32": 2, "4K randwrite QD32": 2}
FEW, MANY = 200, 1200  # requests; the difference between both runs is free of what fio does at its start
LEFT_OUT = {"on_tmpfs": "aio:,cache=on", "on_ext4": "log:|aio:"}  # nothing goes past the cache there; the same again


def measure(load: str) -> float:
    """Return requests/s."""
    pattern, size, depth = LOADS[load]
    told = run(
        *("fio", "--name=speed", f"--filename={DEVICE}", f"--rw={pattern}", f"--bs={size}", f"--iodepth={depth}"),
        *("--ioengine=libaio", "--direct=1", "--time_based", f"--runtime={SECONDS}", "--output-format=json"),
    ).out
    job = json.loads(told[told.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


def count(load: str, pids: Sequence[int], trace: Path) -> tuple[dict[str, float], str]:
    """Return what one request costs, as the columns of `counts.txt`, and which system calls those are."""
    few, many = (_counted(load, requests, pids, trace) for requests in (FEW, MANY))
    more = {
        "to and fro": many.notifications - few.notifications,
        "system calls": _without_clock(many) - _without_clock(few),
        "clock": many.system_calls[CLOCK] - few.system_calls[CLOCK],
        "grants": many.hypercalls[GRANT_TABLE_OP] - few.hypercalls[GRANT_TABLE_OP],
        "events": many.hypercalls[EVENT_CHANNEL_OP] - few.hypercalls[EVENT_CHANNEL_OP],
        "hypercalls": many.hypercalls.total() - few.hypercalls.total(),
    }
    calls = {
        name: (number - few.system_calls[name]) / (MANY - FEW) for name, number in many.system_calls.most_common(8)
    }
    told = ", ".join(f"{name} {each:.2f}" for name, each in calls.items() if each >= 0.01)
    return {name: value / (MANY - FEW) for name, value in more.items()}, told


def _without_clock(counts: Counts) -> int:
    """Return the system calls but those that real hosts save: there, the vDSO reads the clock without one."""
    return counts.system_calls.total() - counts.system_calls[CLOCK]


def _counted(load: str, requests: int, pids: Sequence[int], trace: Path) -> Counts:
    pattern, size, depth = LOADS[load]
    with counted(pids, trace) as counts:
        run(
            *("fio", "--name=count", f"--filename={DEVICE}", f"--rw={pattern}", f"--bs={size}"),
            *(f"--iodepth={depth}", "--ioengine=libaio", "--direct=1", f"--number_ios={requests}"),
        )
    return counts


def served(place: str) -> list[str]:
    """Return the backends that are compared on a file system."""
    return [each for each in BACKENDS if each != LEFT_OUT[place]]


def table(rates: Rates) -> str:
    """Return the rates of blkback, and for the others the median of their ratios to it in the same rounds."""
    lines = []
    for place in dict.fromkeys(each for each, _, _ in rates):
        others = [each for each in served(place) if each != "blkback"]
        lines.append(f"{place:<20}{'blkback/s':>10}" + "".join(f"{each:>20}" for each in others))
        for load in LOADS:
            base = rates[place, "blkback", load]
            line = f"  {load:<18}{statistics.median(base):>10.0f}"
            for backend in others:
                ratios = [one / other for one, other in zip(rates.get((place, backend, load), []), base, strict=False)]
                cell = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]" if ratios else "refused"
                line += f"{cell:>20}"
            lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.usefixtures("_dom0_qemu")
def test_speed(request: pytest.FixtureRequest, the_service: Service) -> None:
    """In each round every backend serves the same image in turn; the rates are written to files."""
    rates: Rates = {}
    for _ in range(ROUNDS):
        for place in ("on_tmpfs", "on_ext4"):
            image = request.getfixturevalue(place) / "speed.raw"
            image.write_bytes(os.urandom(SIZE_MIB << 20))
            for backend in served(place):
                with BACKENDS[backend](image):
                    for load in LOADS:
                        rates.setdefault((place, backend, load), []).append(measure(load))
            (OUT / "speed.txt").write_text(table(rates))
            (OUT / "speed.json").write_text(json.dumps([[*key, value] for key, value in rates.items()], indent=1))

    assert all(rate > 0 for each in rates.values() for rate in each)


@pytest.mark.usefixtures("_dom0_qemu")
def test_counts(on_tmpfs: Path, the_service: Service) -> None:
    """A request takes no more notifications and calls of the grant table than with blkback, and no system call without
    need.
    """
    image = on_tmpfs / "speed.raw"
    image.write_bytes(os.urandom(SIZE_MIB << 20))
    rows: dict[tuple[str, str], dict[str, float]] = {}
    calls: dict[tuple[str, str], str] = {}
    for backend in COUNTED:
        with BACKENDS[backend](image):
            for load in COUNTED_LOADS:
                rows[load, backend], calls[load, backend] = count(load, _pids(backend, the_service), on_tmpfs / "trace")
    columns = list(next(iter(rows.values())))
    lines = [f"{'a request':<18}  {'':<10}" + "".join(f"{each:>14}" for each in columns)]
    for load in COUNTED_LOADS:
        for backend in COUNTED:
            cells = "".join(f"{rows[load, backend][each]:>14.2f}" for each in columns)
            lines.append(f"{load:<18}  {backend:<10}{cells}  {calls[load, backend]}")
    (OUT / "counts.txt").write_text("\n".join(lines) + "\n")

    for load in COUNTED_LOADS:
        ours, theirs = rows[load, "aio:"], rows[load, "blkback"]
        for each in ("to and fro", "grants"):
            assert ours[each] <= 1.1 * theirs[each] + 0.1, f"{load}: {each}"  # a few come from elsewhere
        for backend in ("aio:", "qdisk"):  # else nothing was counted, and no limit means anything
            assert rows[load, backend]["system calls"] > 0.5, f"{load}: {backend}"
            assert rows[load, backend]["to and fro"] > 0, f"{load}: {backend}"
        assert ours["system calls"] <= MOST_CALLS[load] + 0.1, load


def _pids(backend: str, service: Service) -> list[int]:
    if backend == "blkback":
        return []
    if backend == "qdisk":  # ours, or one that Xen's init script has started
        return [int(each) for each in run("pgrep", "--full", "xen-attach").out.split()]
    return [service.disk(0, "xvdq")["worker"]]
