"""A driver domain: the same Debian as in dom0, in a PV guest, with our service and `xl devd` in it.

Must not set up anything that docs/driver-domains.md does not tell an administrator to.

Its root is a disk that the machine has for it, with dom0's content as that was built (tests/xen/bed/boot.py). It does
what it is told on its console, as our small guests do. The root outlives it: its second life finds what the first one
has installed.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.xen.tools import xenstore
from tests.xen.tools.command import Failed, driver_domains, run, until
from tests.xen.tools.disks import KIND, line
from tests.xen.tools.guest import RAMDISK, Guest

NAME = "storage"
DEVID = {"xvda": 51712, "xvdb": 51728}
_FILES = Path(__file__).parents[1] / "bed/files"
_INITRD = Path(f"/run/{NAME}.initrd")
_COMMAND_LINE = "console=hvc0 quiet loglevel=1 mitigations=off systemd.show_status=0 systemd.mask=suite.service"
_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /modules/order); do
    /bin/busybox insmod "/modules/$module"
done
until [ -b /dev/xvda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/xvda /root
/bin/busybox umount /proc /sys
/bin/busybox mount -o move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""
_ORDERS = """\
[Unit]
After=xenbackend.service xl-devd.service
[Service]
ExecStart=/usr/local/bin/take-orders
[Install]
WantedBy=multi-user.target
"""
_DEVD = """\
[Unit]
Description=Devices that this domain gives to others
After=xenbackend.service
[Service]
ExecStart=/usr/sbin/xl devd -F
[Install]
WantedBy=multi-user.target
"""
_INSTALL = """
set -e
echo 'install xen-blkback /bin/false' >/etc/modprobe.d/no-blkback.conf
ln -sf /opt/xenbackend/bin/xenbackend /usr/local/bin/xenbackend
xenbackend install
systemctl daemon-reload
systemctl enable --now xl-devd
"""


class DriverDomain:
    """The domain, which can be booted, destroyed, and booted again; also what `Load` asks for a disk's counters."""

    def __init__(self) -> None:
        device = run("find-disk", "driver").out.strip()
        _prepare(device)
        self.guest = Guest(
            name=NAME,
            memory_mib=512,
            ramdisk=str(_INITRD),
            disks=[f"phy:{device},xvda,w"],
            command_line=_COMMAND_LINE,
            extra="driver_domain = 1",
        )
        self._lives = 0

    @property
    def domid(self) -> int:
        """Its number, another one in each life."""
        return self.guest.domid

    def boot(self) -> DriverDomain:
        """Create the domain, and return when it serves."""
        self._lives += 1
        driver_domains.add(NAME)
        self.guest.create().wait_for(".*".join(["@ready"] * self._lives))
        if self._lives == 1:
            self.run(_INSTALL)
        until("the service there runs", lambda: xenstore.read(self._status) is not None)
        self.run("systemctl is-system-running --wait", check=False)  # what still starts is in the way of the first disk
        return self

    def end(self) -> None:
        """Destroy it, without a word to what runs in it."""
        self.guest.destroy()
        until(f"{NAME} is gone", lambda: not self.guest.is_there())
        driver_domains.discard(NAME)

    def run(self, script: str, *, check: bool = True) -> str:
        """Run a shell script in it to its end, and return its output. Raises: Failed."""
        return self.guest.run(script, check=check)

    def line(self, chain: str, vdev: str, *, kind: str = KIND) -> str:
        """Return a disk of this domain as plain xl takes it."""
        return f"backend={NAME},{line(chain, vdev, kind=kind)}"

    def backend(self, guest: Guest, vdev: str, *, kind: str = KIND) -> str:
        """Return the directory of a disk's backend in xenstore."""
        return f"/local/domain/{self.domid}/backend/{kind}/{guest.domid}/{DEVID[vdev]}"

    def shown(self, guest: Guest, vdev: str, key: str, *, kind: str = KIND) -> str:
        """Return what the service there shows in xenstore of a disk, empty where it shows nothing."""
        return xenstore.read(f"{self._status}/{kind}/{guest.domid}/{DEVID[vdev]}/{key}") or ""

    def wait_until_served(self, guest: Guest, vdev: str, *, but_not_by: str = "") -> str:
        """Return the process there that serves a disk, once another one than `but_not_by` does."""

        def look() -> str:
            worker = self.shown(guest, vdev, "worker")
            return worker if self.shown(guest, vdev, "phase") == "serving" and worker not in ("", but_not_by) else ""

        return until(f"{vdev} is served", look)

    def disks(self) -> list[dict[str, Any]]:
        """Return what `xenbackend status --json` prints there."""
        found: list[dict[str, Any]] = json.loads(self.run("xenbackend status --json"))["vbds"]
        return found

    def disk(self, domid: int, vdev: str) -> dict[str, Any]:
        """Return what is known of one disk. Raises: StopIteration where it is not served."""
        return next(each for each in self.disks() if (each["domid"], each["device"]) == (domid, vdev))

    @property
    def _status(self) -> str:
        return f"/local/domain/{self.domid}/data/xenbackend"


@contextmanager
def driver_domain() -> Iterator[DriverDomain]:
    """Have it for a `with` block, in another life each time."""
    domain = _the_one()
    try:
        yield domain.boot()
    except BaseException as error:
        with suppress(Failed):
            error.add_note(domain.run("journalctl --no-pager --boot --output=short-monotonic -u xenbackend -u xl-devd"))
        raise
    finally:
        if domain.domid:
            domain.end()


@cache
def _the_one() -> DriverDomain:
    """Return the domain: there is one, since there is one disk for its root, and one log of its console."""
    return DriverDomain()


def _prepare(device: str) -> None:
    """Put into the domain's root what tests need, and the project as pip has installed it here."""
    _INITRD.write_bytes(Path(RAMDISK).read_bytes() + _archive("init", _INIT.encode()))
    with _mounted(device) as root:
        shutil.copy(_FILES / "take-orders", root / "usr/local/bin")
        (root / "usr/local/bin/take-orders").chmod(0o755)
        (root / "etc/hostname").write_text(f"{NAME}\n")
        units = root / "etc/systemd/system"
        (units / "orders.service").write_text(_ORDERS)
        (units / "xl-devd.service").write_text(_DEVD)
        (units / "multi-user.target.wants/orders.service").symlink_to("../orders.service")
        packages = Path(sysconfig.get_path("purelib"))
        for each in packages.glob("xenbackend*"):
            shutil.copytree(each, root / each.relative_to("/"), symlinks=True)
        program = Path(sys.prefix, "bin/xenbackend")
        shutil.copy(program, root / program.relative_to("/"))


@contextmanager
def _mounted(device: str) -> Iterator[Path]:
    place = Path(f"/run/{NAME}.root")
    place.mkdir(exist_ok=True)
    run("mount", device, place)
    try:
        yield place
    finally:
        run("umount", place)
        place.rmdir()


def _archive(name: str, content: bytes) -> bytes:
    """Return a cpio archive of one program, which Linux unpacks over what an initramfs has before it.

    Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
    """

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    def entry(number: int, name: str, mode: int, content: bytes) -> bytes:
        values = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = "070701" + "".join(f"{each:08x}" for each in values) + f"{name}\0"
        return padded(head.encode()) + padded(content)

    return entry(1, name, 0o100755, content) + entry(0, "TRAILER!!!", 0, b"")
