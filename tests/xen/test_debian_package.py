"""The Debian package in a running system, in the place of what pip has installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.tools.command import run
from tests.xen.tools.disks import blank, head
from tests.xen.tools.service import Service, attached

PACKAGE = next(Path("/parcel").glob("xenbackend_*_all.deb"), None)
OF_PIP = "/opt/xenbackend/bin/xenbackend"
DEVICE = Path("/dev/xvdq")
PLACES = ("etc", "run", "usr/bin", "usr/lib", "usr/share", "var/lib")
WORD = b"written before the upgrade"


@pytest.fixture
def nothing_installed() -> Iterator[None]:
    """Nothing of ours is in the system; in the end it is as pip and `xenbackend install` had made it."""
    if PACKAGE is None:
        pytest.skip("no package was built: make deb")
    run(OF_PIP, "uninstall")
    yield
    run("dpkg", "--purge", "xenbackend")
    run(OF_PIP, "install")


def ours() -> list[Path]:
    """Return what bears our name, or that of our hotplug script's alias."""
    names = ("*xenbackend*", "tap2")
    return [found for place in PLACES for name in names for found in Path("/", place).rglob(name)]


def test_from_installation_to_purge(nothing_installed: None, on_ext4: Path) -> None:
    """Once the package is installed the service runs and serves disks, which an upgrade only makes wait; when it is
    purged, nothing of it is left.
    """
    assert [] == ours()
    run("dpkg", "--install", PACKAGE)
    first = Service().pid
    with attached(0, "xvdq", f"log:|aio:{blank(on_ext4 / 'disk.raw', 16)}"):
        run("dd", f"of={DEVICE}", "oflag=direct", "conv=sync", text=WORD.decode())
        run("dpkg", "--install", PACKAGE)
        second = Service().pid
        content = head(DEVICE, len(WORD))
    command = Path(f"/proc/{second}/cmdline").read_bytes().split(b"\0")
    run("dpkg", "--purge", "xenbackend")

    assert 0 != first != second != 0
    assert b"/usr/bin/xenbackend" in command
    assert WORD == content
    assert (False, []) == (Service().is_active(), ours())
