"""Names the users of an image, in words: mounts, holders and partitions of a block device, and processes with a lock.

Must only be used after something was refused, since it looks at every process. Must not raise, nor wait for a file
system.

Sources: proc_pid_mountinfo(5), proc_pid_fdinfo(5), proc_swaps(5), sysfs-block (holders).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from xenbackend.errors import printable
from xenbackend.kernel import blkback

WORKER = "xb "  # prefix of a worker's process name; the disk follows
_MOST = 3  # users that are named at most
_LONGEST = 60  # characters of a command
_OCTAL = re.compile(r"\\([0-7]{3})")


def users_of(fd: int, *, by_claim: bool = True) -> str:
    """Return who else uses an open file or block device, in words that follow "it is used by"; empty if not known.

    `by_claim`: also users within the kernel, which claim a device.
    """
    with suppress(OSError):
        status = os.fstat(fd)
        found = _kernel_users(status.st_rdev) if by_claim and stat.S_ISBLK(status.st_mode) else iter(())
        named = [*islice(found, _MOST)] or [*islice(_processes(status), _MOST)]
        return ", ".join(dict.fromkeys(named))
    return ""


def _kernel_users(number: int) -> Iterator[str]:
    """Yield guests, mounts, swap and holders of a device, of its partitions, and of the disk to which it belongs."""
    own = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    yield from (f"the kernel's backend for the disk {each}" for each in blkback.disks_on(number))
    family = [own, *(each.parent for each in own.glob("*/partition"))]
    if (own / "partition").exists():
        family.append(own.parent)
    for device in family:
        where = "" if device == own else f"/dev/{device.name}, "
        with suppress(OSError):
            place = (device / "dev").read_text().strip()
            yield from (f"{where}a file system mounted at {each}" for each in _mounts(place))
            yield from (f"{where}swap" for _ in _swaps(place))
            yield from (f"{where}{_holder(each)}" for each in sorted((device / "holders").iterdir()))


def _mounts(place: str) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        if fields[2] == place:
            yield printable(_OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4]))


def _swaps(place: str) -> Iterator[str]:
    for line in Path("/proc/swaps").read_text(errors="surrogateescape").splitlines()[1:]:
        path = _OCTAL.sub(lambda found: chr(int(found[1], 8)), line.split()[0])
        if path.startswith("/dev/"):
            number = Path(path).stat().st_rdev
            if f"{os.major(number)}:{os.minor(number)}" == place:
                yield path


def _holder(device: Path) -> str:
    with suppress(OSError):
        return f"/dev/mapper/{printable((device / 'dm' / 'name').read_text().strip())}"
    return f"/dev/{device.name}"


def _processes(status: os.stat_result) -> Iterator[str]:
    """Yield the other processes that have a lock on this file, or have this device open."""
    for pid in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - pathlib costs as much as the rest
        if int(pid) != os.getpid():
            with suppress(OSError):  # the process has ended, or we may not see its files
                if any(_has(pid, fd, status) for fd in os.listdir(f"/proc/{pid}/fd")):  # noqa: PTH208 - the same
                    yield f"{_name(pid)} (process {pid})"


def _has(pid: str, fd: str, status: os.stat_result) -> bool:
    """Return whether a process's descriptor has a lock on this file, or has this block device open.

    A file system that does not answer must not block us, so only files with the same inode number, or in /dev, are
    asked.
    """
    place = f"/proc/{pid}/fd/{fd}"
    with suppress(OSError):  # it was closed
        facts = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
        if "lock:" in facts and (f"ino:\t{status.st_ino}\n" in facts or "ino:" not in facts):  # since Linux 5.14
            return os.path.samestat(os.stat(place), status)  # noqa: PTH116 - as in `_processes`
        if stat.S_ISBLK(status.st_mode) and os.readlink(place).startswith("/dev/"):  # noqa: PTH115 - the same
            found = os.stat(place)  # noqa: PTH116 - the same
            return stat.S_ISBLK(found.st_mode) and found.st_rdev == status.st_rdev
    return False


def _name(pid: str) -> str:
    """Return what people call a process: its disk if it is one of our workers, else its command."""
    own = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    if own.startswith(WORKER):
        return f"the disk {printable(own.removeprefix(WORKER))}"
    words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    command = printable(" ".join([words[0].rpartition("/")[2], *words[1:]])) or printable(own)
    return command if len(command) <= _LONGEST else f"{command[:_LONGEST]}..."
