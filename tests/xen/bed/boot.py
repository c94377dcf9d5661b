"""Boots Xen and dom0 under QEMU's emulation, and hands on each line of the second serial port.

Must not know what the lines mean. KVM is of no use here even where it is: the machine below Xen is emulated throughout.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

XEN_ARGUMENTS = (
    "console=com1 com1=115200 dom0_mem=2G,max:2G loglvl=warning guest_loglvl=warning conring_size=1M "
    "spec-ctrl=eager-fpu"  # the emulation loses registers when they are switched lazily: innocent programs crash
)
LINUX_ARGUMENTS = "console=hvc0 root=/dev/nvme0n1 quiet mitigations=off systemd.show_status=0"


@dataclass(frozen=True, slots=True)
class Machine:
    """What is booted."""

    image: Path  # a directory as `recipe.build` fills it; nothing in it is written
    parcel: Path  # the second disk; written
    console: Path  # where Xen's and dom0's console goes
    cpus: int = 2
    memory_mib: int = 4096


def command(machine: Machine) -> list[str]:
    """Return QEMU's command line.

    With SMAP the emulated CPU makes a PV dom0 crash in its first page fault; virtio disks would need an IOMMU. Without
    ERMS and FSRM kernels copy by words, where the emulation takes as long for a byte as for a word.
    """
    image = machine.image
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max,-smap,-smep,-erms,-fsrm"),
        *("-m", str(machine.memory_mib), "-smp", str(machine.cpus), "-no-reboot", "-nodefaults", "-display", "none"),
        *("-kernel", str(image / "xen"), "-append", XEN_ARGUMENTS),
        *("-initrd", f"{image / 'vmlinux'} {LINUX_ARGUMENTS},{image / 'dom0.cpio'}"),
        *("-drive", f"file={image / 'root.img'},if=none,id=root,format=raw,snapshot=on,cache=unsafe"),
        *("-device", "nvme,drive=root,serial=root"),
        *("-drive", f"file={machine.parcel},if=none,id=parcel,format=raw,cache=unsafe"),
        *("-device", "nvme,drive=parcel,serial=parcel"),
        *("-serial", f"file:{machine.console}", "-chardev", "stdio,id=channel,signal=off"),
        *("-serial", "chardev:channel"),
    ]


def run(machine: Machine, take: Callable[[str], None], timeout_s: float) -> bool:
    """Boot, hand each line to `take`, and return True when the machine ended by itself within its time."""
    in_time = True
    with subprocess.Popen(
        command(machine), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as qemu:

        def end() -> None:
            nonlocal in_time
            in_time = False
            qemu.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            for line in qemu.stdout:
                take(line)
        finally:
            timer.cancel()
            qemu.kill()
    return in_time
