"""QEMU's throttling and ours with the same limits and the same number of writes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.block.drivers.test_throttle import Load
from tests.helpers_block import write
from tests.until import until

pytestmark = pytest.mark.slow  # each takes seconds, since QEMU's clock is the host's
DEPTH = 32
_BURST = "x-iops-total=100,x-iops-total-max=500,x-iops-total-max-length=2"


def theirs(directory: Path, limits: str, length: int, count: int) -> float:
    """Return the seconds that QEMU needs for so many writes, with limits in the terms of its throttle-group."""
    if not (shutil.which("qemu-storage-daemon") and shutil.which("qemu-img")):
        pytest.skip("qemu-storage-daemon or qemu-img is not installed (Debian: qemu-utils)")
    path = directory / "socket"
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon", "--object", f"throttle-group,id=g,{limits}",
            "--blockdev", "null-co,node-name=n,size=1073741824",
            "--blockdev", "throttle,throttle-group=g,node-name=t,file=n",
            "--nbd-server", f"addr.type=unix,addr.path={path}", "--export", "nbd,id=e,node-name=t,writable=on,name=t",
        ]
    )  # fmt: skip
    try:
        until(path.exists)
        bench = ["qemu-img", "bench", "-w", "-f", "raw", "-c", str(count), "-d", str(DEPTH), "-s", str(length)]
        done = subprocess.run([*bench, f"nbd+unix:///t?socket={path}"], capture_output=True, text=True, check=True)
    finally:
        daemon.kill()
        daemon.wait()
    found = re.search(r"completed in ([\d.]+) seconds", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


def ours(options: str, length: int, count: int) -> float:
    """Return the seconds that our driver needs."""
    load = Load(options)
    began = load.env.time
    load.keep_up([write(0, bytes(length)) for _ in range(DEPTH)], 30)
    return load.bottom.done[count - 1][0] - began


@pytest.mark.parametrize(
    ("limits", "options", "length", "count"),
    [
        ("x-iops-total=500", "iops=500", 4096, 600),
        ("x-iops-write=200", "iops_write=200", 4096, 400),
        ("x-bps-total=1048576", "bps=1M", 4096, 500),
        ("x-iops-total=100,x-iops-size=4096", "iops=100,size=4K", 16384, 60),
        ("x-iops-total=50,x-iops-total-max=300", "iops=50,iops_burst=300", 4096, 380),
        (
            "x-iops-total=100,x-iops-total-max=500,x-iops-total-max-length=2",
            "iops=100,iops_burst=500,burst=2s",
            4096,
            600,
        ),
        (
            "x-iops-total=100,x-iops-total-max=500,x-iops-total-max-length=2",
            "iops=100,iops_burst=500,burst=2s",
            4096,
            1400,
        ),
        ("x-bps-write=1048576", "bps_write=1M", 1 << 20, 3),
    ],
)
def test_limits_mean_what_they_mean_to_qemu(tmp_path: Path, limits: str, options: str, length: int, count: int) -> None:
    """A number of writes takes as long as with QEMU, which may be late on a busy host but is never early."""
    here, there = ours(options, length, count), theirs(tmp_path, limits, length, count)

    assert here <= there + 0.02
    assert there <= 1.3 * here + 0.5
