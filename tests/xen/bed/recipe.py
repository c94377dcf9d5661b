"""What the image is made of: a Debian release as dom0 with its Xen, a small Linux guest inside of it, and the emulator.

Must not know what is tested, nor how releases differ (`release.py`). An image's key is a hash of its release, of
`FILES`, and of what the project depends on: a change in any of them causes a new build.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.xen.bed import initramfs, wheels
from tests.xen.bed.image import key_of
from tests.xen.bed.machine import PATH
from tests.xen.bed.release import DECOMPRESS, Release

HERE = Path(__file__).parent
FILES = [
    *(HERE / name for name in ("recipe.py", "initramfs.py")),
    *(HERE / "files" / name for name in ("dom0-init", "guest-init", "take-orders", "suite.service", "find-disk")),
]
PACKAGES = [  # besides the release's own
    *("systemd", "systemd-sysv", "udev", "kmod", "dbus", "linux-image-amd64", "python3", "python3-venv"),
    *("xenstore-utils", "qemu-system-xen", "grub-xen-bin", "grub-xen-host"),
    *("e2fsprogs", "xfsprogs", "fio", "qemu-utils", "iproute2", "procps", "busybox-static", "strace"),
    *("nbdkit", "cryptsetup-bin"),  # what disks are made of besides, and looked at by
    *("python3-daemon", "python3-pyxs", "python3-rich", "python3-structlog"),  # that our own package depends on
]
ROOT_SIZE = "4G"  # sparse
# Debian 13's, on any host: it is a quarter faster than Debian 12's, and all machines are the same.
EMULATOR_SUITE, EMULATOR_PACKAGES = "trixie", ["qemu-system-x86", "seabios"]
VENV = "/opt/xenbackend"  # where the project is installed; bed/files/start
GUEST_TOOLS = [
    *("usr/bin/dash", "usr/bin/flock", "usr/bin/fio", "usr/bin/cmp"),
    *("usr/sbin/mke2fs", "usr/sbin/e2fsck", "usr/sbin/blkdiscard"),
]
GUEST_MODULES = ["crc32c_generic", "ext4", "xen-blkfront"]
MASKED = [  # a getty on hvc0 would take the console away; timers would wake up in the middle of a measurement
    *("getty.target", "serial-getty@hvc0.service", "serial-getty@ttyS1.service", "getty@tty1.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer"),
    *("systemd-timesyncd.service", "xendomains.service"),
]


def name_of(release: Release) -> str:
    """Return the name of a release's image in the cache."""
    return f"image-{release.xen}-{key_of(FILES, [repr(release), *wheels.requirements()])}"


def build(release: Release, directory: Path) -> None:
    """Fill a directory with `emulator/`, `xen`, `vmlinux`, `dom0.cpio` and `root.img`; as root.

    Raises: CalledProcessError.
    """
    root = directory / "root"
    _bootstrap("extract", EMULATOR_PACKAGES, EMULATOR_SUITE, directory / "emulator")
    _bootstrap("minbase", [*PACKAGES, *release.packages], release.suite, root)
    (directory / "xen").write_bytes(gzip.decompress((root / release.hypervisor).read_bytes()))
    kernel = next((root / "boot").glob("vmlinuz-*"))
    version = kernel.name.removeprefix("vmlinuz-")
    (directory / "vmlinux").write_bytes(DECOMPRESS[release.kernel](payload(kernel.read_bytes())))
    source = initramfs.Source(root, version, DECOMPRESS[release.modules])
    initramfs.make(
        directory / "dom0.cpio",
        source,
        init=HERE / "files/dom0-init",
        modules=["crc32c_generic", "ext4", "nvme"],
        scripts=[HERE / "files/find-disk"],
    )
    _add_guest(source, directory / "vmlinux")
    _configure(root)
    image = directory / "root.img"
    _run("truncate", "-s", ROOT_SIZE, str(image))
    _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image))
    shutil.rmtree(root)


def payload(kernel: bytes) -> bytes:
    """Return the compressed ELF file in a Linux kernel; booting that file spares the emulated CPU the unpacking.

    Source: Linux Documentation/arch/x86/boot.rst (setup_sects, payload_offset, payload_length).
    """
    (setup_sectors,) = struct.unpack_from("<B", kernel, 0x1F1)
    offset, length = struct.unpack_from("<II", kernel, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return kernel[start : start + length]


def _add_guest(source: initramfs.Source, vmlinux: Path) -> None:
    place = source.root / "opt/guest"
    place.mkdir(parents=True)
    shutil.copy(vmlinux, place)
    initramfs.make(
        place / "initrd",
        source,
        init=HERE / "files/guest-init",
        modules=GUEST_MODULES,
        scripts=[HERE / "files/take-orders"],
        tools=GUEST_TOOLS,
    )


def _configure(root: Path) -> None:
    (root / "etc/hostname").write_text("dom0\n")
    (root / "etc/fstab").write_text("")
    (root / "parcel").mkdir()
    (root / "var/log/xen/console").mkdir(parents=True, exist_ok=True)
    with (root / "etc/default/xen").open("a") as file:
        file.write("XENCONSOLED_ARGS=--log=guest\n")
    _add_wheels(root)
    shutil.copy(HERE / "files/suite.service", root / "etc/systemd/system/")
    shutil.copy(HERE / "files/find-disk", root / "usr/local/bin/")
    _run("chroot", str(root), "systemctl", "--quiet", "enable", "suite.service")
    _run("chroot", str(root), "systemctl", "--quiet", "mask", *MASKED)


def _add_wheels(root: Path) -> None:
    """Make the environment that the project is installed into, with its dependencies: in dom0 this takes a minute."""
    place = root / "tmp/wheels"
    wheels.fetch(place)
    _run("chroot", str(root), "python3", "-m", "venv", VENV)
    pip = (f"{VENV}/bin/pip", "install", "--quiet", "--no-index", "--find-links=/tmp/wheels")
    _run("chroot", str(root), *pip, *wheels.requirements())
    shutil.rmtree(place)


def _bootstrap(variant: str, packages: Sequence[str], suite: str, directory: Path) -> None:
    _run("mmdebstrap", "--quiet", f"--variant={variant}", f"--include={','.join(packages)}", suite, str(directory))


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
