"""Guests: made by xl, watched and spoken to by their console.

Must not know of disks but what stands in a guest's configuration.

The console's output is read from the log that xenconsoled writes, which outlives the guest; what is typed goes to the
terminal that xenstore names. `/opt/guest` holds a kernel and an initramfs with busybox, blkfront, ext4, fio and
e2fsprogs; its init runs what `Guest.start` sends (tests/xen/bed/files/guest-init).
"""

from __future__ import annotations

import base64
import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.xen.tools import xenstore
from tests.xen.tools.command import Failed, Result, T, until, xl

KERNEL = "/opt/guest/vmlinux"
RAMDISK = "/opt/guest/initrd"
GRUB_PV = "/usr/lib/grub-xen/grub-x86_64-xen.bin"  # the 64-bit ABI, one queue, no persistent grants
GRUB_PVH_32 = "/usr/lib/grub-xen/grub-i386-xen_pvh.bin"  # x86_32-abi
LOGS = Path("/var/log/xen/console")
_numbers = itertools.count(1)


def names() -> list[str]:
    """Return the names of all guests."""
    return [line.split()[0] for line in xl("list").out.splitlines()[2:]]  # after the heading and dom0


@dataclass
class Guest:
    """A guest's configuration and, once it is created, the guest.

    Linux with a command line by default; `kernel` and `ramdisk` make it something else.
    """

    kind: str = "pv"
    kernel: str | None = KERNEL  # None: a bootloader finds one
    ramdisk: str | None = RAMDISK
    disks: list[str] = field(default_factory=list)  # as in xl's configuration
    memory_mib: int = 384
    vcpus: int = 1
    command_line: str = "console=hvc0 quiet sysrq_always_enabled"
    extra: str = ""  # further lines of the configuration
    name: str = ""
    domid: int = 0  # 0: not created yet

    def __post_init__(self) -> None:
        self.name = self.name or f"guest{next(_numbers)}"
        self._jobs = itertools.count(1)

    @property
    def configuration(self) -> str:
        """The text for xl."""
        kernel = f'kernel = "{self.kernel}"\n' if self.kernel else ""
        ramdisk = f'ramdisk = "{self.ramdisk}"\ncmdline = "{self.command_line}"\n' if self.ramdisk else ""
        return (
            f'name = "{self.name}"\ntype = "{self.kind}"\n{kernel}{ramdisk}'
            f"memory = {self.memory_mib}\nvcpus = {self.vcpus}\ndisk = {self.disks!r}\n"
            f'on_poweroff = "destroy"\non_reboot = "destroy"\non_crash = "destroy"\n{self.extra}\n'
        )

    def try_to_create(self, *, paused: bool = False, by: Callable[..., Result] = xl) -> Result:
        """Create the guest with xl, or what else takes its arguments, and return how that ended."""
        file = Path(f"/run/{self.name}.cfg")
        file.write_text(self.configuration)
        result = by("create", *(["-p"] if paused else []), file, check=False)
        if not result.status:
            self.look_up()
        return result

    def create(self, *, paused: bool = False, by: Callable[..., Result] = xl) -> Guest:
        """Create the guest, and return when that is done. Raises: Failed."""
        result = self.try_to_create(paused=paused, by=by)
        if result.status:
            raise Failed(f"{self.name} was not created:\n{result.out}{result.err}")
        return self

    def look_up(self) -> None:
        """Take notice of the number that the guest has now: a reboot gives it another one."""
        self.domid = int(xl("domid", self.name).out)

    def unpause(self) -> Guest:
        """Let a paused guest run."""
        xl("unpause", self.domid)
        return self

    def destroy(self) -> None:
        """Take the guest away, whatever it is doing; no error where it has gone already."""
        xl("destroy", self.name, check=False)

    def is_there(self) -> bool:
        """Return whether the guest still exists."""
        return xenstore.read(f"/local/domain/{self.domid}/name") == self.name

    def wait_until_gone(self) -> None:
        """Return when the guest has ended by itself and xl has cleaned up."""
        self._until("its end", lambda: not self.is_there())

    @property
    def log(self) -> str:
        """All that the guest has printed; after a migration under the name that it came with."""
        files = [LOGS / f"guest-{self.name}{suffix}.log" for suffix in ("", "--incoming")]
        return "".join(file.read_text(errors="replace").replace("\r\n", "\n") for file in files if file.exists())

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match in what the guest prints (multi-line, dots match all). Raises: Failed with the log."""
        return self._until(pattern, lambda: re.search(pattern, self.log, re.MULTILINE | re.DOTALL))

    def _until(self, what: str, look: Callable[[], T]) -> T:
        try:
            return until(what, look)
        except Failed as error:
            raise Failed(f"{error}; {self.name} said:\n{self.log[-2000:]}") from None

    def wait_until_ready(self) -> Guest:
        """Return when our Linux takes commands."""
        self.wait_for(r"^@ready")
        return self

    def type(self, text: str) -> None:
        """Type on the console."""
        terminal = until(f"{self.name} has a console", lambda: xenstore.read(f"/local/domain/{self.domid}/console/tty"))
        with Path(terminal).open("wb", buffering=0) as file:
            file.write(text.encode())

    def start(self, script: str) -> Job:
        """Run a shell script in our Linux, beside those that run already, and return at once."""
        job = Job(self, f"{next(self._jobs)}")
        lines = textwrap.wrap(base64.b64encode(textwrap.dedent(script).encode()).decode(), 76)
        self.type("".join(f"{line}\n" for line in [f"run {job.id}", *lines, "."]))
        return job

    def run(self, script: str, *, check: bool = True) -> str:
        """Run a shell script in our Linux to its end and return its output. Raises: Failed."""
        return self.start(script).wait(check=check)


def unbind(devid: int) -> str:
    """Return a script that takes a disk away from Linux's blkfront, which cannot be unloaded while it has one."""
    return f"echo vbd-{devid} >/sys/bus/xen/drivers/vbd/unbind"


@dataclass(frozen=True, slots=True)
class Job:
    """A script that was started in a guest."""

    guest: Guest
    id: str

    def is_over(self) -> bool:
        """Return whether it has ended."""
        return f"@end {self.id} " in self.guest.log

    def wait(self, *, check: bool = True) -> str:
        """Return the output once the script has ended. Raises: Failed, when `check` and its status is not 0."""
        found = self.guest.wait_for(rf"^@begin {self.id}\n(.*)^@end {self.id} (\d+)$")
        output, status = found.groups()
        if check and status != "0":
            raise Failed(f"a script in {self.guest.name} ended with {status}:\n{output}")
        return output
