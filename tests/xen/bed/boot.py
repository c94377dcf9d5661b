"""Boots Xen and dom0 under QEMU's emulation, and passes on each line of the second serial port.

Must not know what the lines mean. KVM would be of no use here: the machine below Xen is emulated throughout.
"""

from __future__ import annotations

import os
import select
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.xen.bed.share import Given, Watch

XEN_ARGUMENTS = (
    "console=com1 com1=115200 dom0_mem=2G,max:2G loglvl=warning guest_loglvl=warning conring_size=1M "
    "dom0_max_vcpus=2 "  # however many CPUs there are: as many queues are offered to guests
    "spec-ctrl=eager-fpu"  # the emulation loses registers when they are switched lazily: innocent programs crash
)
LINUX_ARGUMENTS = "console=hvc0 quiet mitigations=off systemd.show_status=0"

_LOOK_S = 1.0  # between two looks at the CPU time that the host gives


@dataclass(frozen=True, slots=True)
class Machine:
    """What is booted."""

    image: Path  # a directory as `recipe.build` fills it; nothing in it is written
    parcel: Path  # the second disk; written
    console: Path  # where Xen's and dom0's console goes
    cpus: int
    memory_mib: int = 4096


def command(machine: Machine) -> list[str]:
    """Return QEMU's command line.

    With SMAP the emulated CPU makes a PV dom0 crash in its first page fault; virtio disks would need an IOMMU. Without
    ERMS and FSRM kernels copy by words, where the emulation takes as long for a byte as for a word.
    """
    image = machine.image
    return [
        *(*_emulator(image / "emulator"), "-accel", "tcg,thread=multi", "-cpu", "max,-smap,-smep,-erms,-fsrm"),
        *("-m", str(machine.memory_mib), "-smp", str(machine.cpus), "-no-reboot", "-nodefaults", "-display", "none"),
        *("-kernel", str(image / "xen"), "-append", XEN_ARGUMENTS),
        *("-initrd", f"{image / 'vmlinux'} {LINUX_ARGUMENTS},{image / 'dom0.cpio'}"),
        *("-drive", f"file={image / 'root.img'},if=none,id=root,format=raw,snapshot=on,cache=unsafe"),
        *("-device", "nvme,drive=root,serial=root"),
        *("-drive", f"file={image / 'root.img'},if=none,id=driver,format=raw,snapshot=on,cache=unsafe"),
        *("-device", "nvme,drive=driver,serial=driver"),  # the root of a driver domain
        *("-drive", f"file={machine.parcel},if=none,id=parcel,format=raw,cache=unsafe"),
        *("-device", "nvme,drive=parcel,serial=parcel"),
        *("-serial", f"file:{machine.console}", "-chardev", "stdio,id=channel,signal=off"),
        *("-serial", "chardev:channel"),
    ]


def _emulator(root: Path) -> list[str]:
    """Return the words that start the image's own emulator, with its own libraries and firmware."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return [
        *("env", f"QEMU_MODULE_DIR={libraries / 'qemu'}"),
        *(str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)),
        *(str(root / "usr/bin/qemu-system-x86_64"), "-L", str(root / "usr/share/qemu")),
        *("-L", str(root / "usr/share/seabios")),
    ]


def run(machine: Machine, take: Callable[[str, Given], None], silence_s: float, stop: threading.Event) -> bool:
    """Boot, pass on each line with what the host gave until then; return True if the machine ended by itself.

    The machine is ended when it has printed nothing for `silence_s` seconds of its own (see `share.Given`), or when
    `stop` is set.
    """
    with subprocess.Popen(command(machine), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        try:
            return _listen(qemu, take, silence_s, stop)
        finally:
            qemu.kill()


def _listen(
    qemu: subprocess.Popen[bytes], take: Callable[[str, Given], None], silence_s: float, stop: threading.Event
) -> bool:
    assert qemu.stdout is not None
    watch, rest = Watch(qemu.pid), b""
    heard = watch.look()
    while not stop.is_set():
        is_there = select.select([qemu.stdout], [], [], _LOOK_S)[0]
        given = watch.look()
        if is_there:
            data = os.read(qemu.stdout.fileno(), 65536)
            if not data:
                return True
            heard = given
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                take(line.decode(errors="replace"), given)
        elif given.own_s - heard.own_s > silence_s:
            break
    return False
