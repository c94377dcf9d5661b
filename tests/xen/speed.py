"""How fast our service is compared with xen-blkback and QEMU's qdisk, through dom0's own blkfront, in one boot.

Must not judge: everything is 20 to 50 times slower than on real hardware, and only ratios mean anything. Not part of
the suite; `make bench-xen` runs it and leaves `speed.txt` and `speed.json` with the other results.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.xen.tools import xenstore
from tests.xen.tools.command import run, until, xl
from tests.xen.tools.service import Service, attached

DEVICE = Path("/dev/xvdq")
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
    pid_file = Path("/run/xen/speed-qemu.pid")
    pid_file.parent.mkdir(exist_ok=True)
    run(
        *(QEMU, "-xen-domid", "0", "-xen-attach", "-name", "dom0", "-M", "xenpv", "-daemonize", "-nographic"),
        *("-monitor", "/dev/null", "-serial", "/dev/null", "-parallel", "/dev/null", "-pidfile", pid_file),
    )
    pid = pid_file.read_text().strip()
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
    out = Path("/parcel/out")
    for _ in range(ROUNDS):
        for place in ("on_tmpfs", "on_ext4"):
            image = request.getfixturevalue(place) / "speed.raw"
            image.write_bytes(os.urandom(SIZE_MIB << 20))
            for backend in served(place):
                with BACKENDS[backend](image):
                    for load in LOADS:
                        rates.setdefault((place, backend, load), []).append(measure(load))
            (out / "speed.txt").write_text(table(rates))
            (out / "speed.json").write_text(json.dumps([[*key, value] for key, value in rates.items()], indent=1))

    assert all(rate > 0 for each in rates.values() for rate in each)
