"""The Debian package in a running system, instead of what pip has installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.test_kills import complaints, wait_until_served
from tests.xen.tools.command import run, until
from tests.xen.tools.disks import blank, head
from tests.xen.tools.guest import Guest
from tests.xen.tools.load import Load
from tests.xen.tools.service import Service, attached
from xenbackend import __version__

PACKAGE = next(Path("/parcel").glob("xenbackend_*_all.deb"), None)
FORMER = next(Path("/parcel/former").glob("xenbackend_*_all.deb"), None)
OF_PIP = "/usr/local/bin/xenbackend"  # as the bed installs it
OF_PACKAGE = "/usr/bin/xenbackend"
DEVICE = Path("/dev/xvdq")
PLACES = ("etc", "run", "usr/bin", "usr/lib", "usr/share", "var/lib")
WORD = b"written before the upgrade"


@pytest.fixture
def nothing_installed() -> Iterator[None]:
    """Remove everything of ours; afterwards restore what pip and `xenbackend install` had made."""
    if PACKAGE is None:
        pytest.skip("no package was built: make deb")
    run(OF_PIP, "uninstall")
    yield
    run("dpkg", "--purge", "xenbackend")
    run(OF_PIP, "install")


def ours() -> list[Path]:
    """Return the paths that bear our name, or that of our hotplug script's alias."""
    names = ("*xenbackend*", "tap2")
    return [found for place in PLACES for name in names for found in Path("/", place).rglob(name)]


def test_from_installation_to_purge(nothing_installed: None, on_ext4: Path) -> None:
    """The installed package serves disks, an upgrade only delays them, and a purge leaves nothing."""
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


def wait_until_written(guest: Guest) -> None:
    """Return when the guest counts more writes to its xvdb than before, whoever serves it."""

    def writes() -> int:
        return int(guest.run("cat /sys/block/xvdb/stat").split()[4])

    before = writes()
    until("xvdb is written", lambda: writes() > before)


def renumbered(version: str, directory: Path) -> Path:
    """Return the same package with another version number."""
    tree, package = directory / version, directory / f"xenbackend_{version}_all.deb"
    run("dpkg-deb", "--raw-extract", PACKAGE, tree)
    control = tree / "DEBIAN/control"
    lines = [
        f"Version: {version}" if line.startswith("Version:") else line for line in control.read_text().splitlines()
    ]
    control.write_text("\n".join(lines) + "\n")
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, package)
    return package


@pytest.mark.skipif(FORMER is None, reason="no package of the last release was built: make deb-former")
def test_from_one_version_to_the_next(linux: Guest, nothing_installed: None, on_ext4: Path, tmp_path: Path) -> None:
    """A guest's disk survives two upgrades of the package, the first one with a new worker; fio finds no fault.

    A downgrade is refused while the guest has its disk, and disturbs nothing.
    """
    following, later = renumbered(f"{__version__}+1", tmp_path), renumbered(f"{__version__}+2", tmp_path)
    run("dpkg", "--install", FORMER)
    image, since = blank(on_ext4 / "disk.raw", 64), len(linux.log)
    services, chain = [Service().pid], f"log:|aio:{image}"
    run(OF_PACKAGE, "attach", linux.domid, "xvdb", chain, "--wait")
    try:
        load = Load(linux, "xvdb")
        wait_until_written(linux)
        workers = [wait_until_served(linux)]
        run("dpkg", "--install", following)
        workers.append(wait_until_served(linux, but_not_by=workers[-1]))
        wait_until_written(linux)
        services.append(Service().pid)
        run("dpkg", "--install", later)
        services.append(Service().pid)
        workers.append(wait_until_served(linux))
        wait_until_written(linux)
        refused = run("dpkg", "--install", following, check=False)
        services.append(Service().pid)
        workers.append(wait_until_served(linux))
        load.stop()
        version = run("dpkg-query", "--show", "--showformat=${Version}", "xenbackend").out
        errors = Service().disk(linux.domid, "xvdb")["counters"]["errors"]
    finally:
        run(OF_PACKAGE, "detach", linux.domid, "xvdb", "--force", check=False)

    assert ([], 0) == (complaints(linux, since), errors)
    assert 0 not in services
    assert 3 == len(set(services[:3]))  # debhelper's postinst starts it again even after a refusal
    assert (2, workers[1]) == (len(set(workers)), workers[3])
    assert (True, f"{__version__}+2") == (refused.status != 0, version)
    assert f"guests have disks: {linux.domid}/xvdb" in refused.err + refused.out
    assert "cannot take over disks" in refused.err + refused.out
