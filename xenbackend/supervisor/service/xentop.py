"""What `xentop` shows of our disks: a record per vbd in shared memory, as tapdisk3 has it.

Must not ask a worker, nor be needed by anything: if a record cannot be kept, disks are served all the same.

libxenstat of Xen 4.19 and later goes through the devices of the kernel's xen-backend bus. For each ``vbd3-D-N`` it
takes a number from ``kthread-pid`` in the backend's directory and reads the record ``/dev/shm/td3-<number>/vbd-D-N``.
Earlier versions know only what xen-blkback has in sysfs and what QEMU says, and do not show our disks.

The records are in a directory of our own, to which ``td3-<pid>`` is a link. Where a link leads shows whose it is, so
what a killed service left can be found and removed, and nothing of tapdisk's ever is.

Source: Xen tools/libs/stat/xenstat_linux.c, `xenstat_collect_vbds`, and struct vbd3_stats in xenstat_priv.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from struct import Struct

from xenbackend import counters
from xenbackend.errors import KernelError
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.units import SECTOR

KIND = "vbd3"  # of the vbds that libxenstat looks for
PERIOD_S = 1.0  # between two looks at the counters; workers write theirs as often
DIRECTORY = Path("/run/xenbackend/xentop")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where libxenstat looks
_RECORD = Struct("=II11Q")
_VERSION = 1


def pack_record(page: memoryview) -> bytes:
    """Return the record for a vbd with these counters, `counters.SIZE` bytes.

    Fields: version, padding, out of requests; submitted, completed, 512-byte sectors, ticks, of reads and of writes;
    errors, flags. What we do not measure is 0; requests in flight show once they are answered.
    """
    now = counters.snapshot(page)
    reads, writes = now["reads"], now["writes"]
    read_sectors, written_sectors = now["read_bytes"] // SECTOR, now["written_bytes"] // SECTOR
    of_reads, of_writes = (reads, reads, read_sectors, 0), (writes, writes, written_sectors, 0)
    return _RECORD.pack(_VERSION, 0, 0, *of_reads, *of_writes, now["errors"], 0)


class Xentop:
    """The records of one service's vbds."""

    def __init__(
        self, directory: Path = DIRECTORY, shared_memory: Path = SHARED_MEMORY, pid: int | None = None
    ) -> None:
        """Keep the records in `directory`, which only we use; it is made with the first record."""
        self._directory = directory
        self._shared_memory = shared_memory
        self._link = shared_memory / f"td3-{os.getpid() if pid is None else pid}"
        self._records: dict[VbdPath, tuple[int, bytes]] = {}  # descriptor, and the record as last written

    def clear(self) -> None:
        """Remove everything, including what an earlier service left."""
        self.keep_only(())
        for link in self._shared_memory.glob("td3-*"):
            if _leads_to(link, self._directory):
                with suppress(OSError):
                    link.unlink()
        for record in self._directory.glob("vbd-*"):
            with suppress(OSError):
                record.unlink()
        with suppress(OSError):
            self._directory.rmdir()

    def show(self, path: VbdPath, page: memoryview) -> None:
        """Bring the record of a vbd up to date with its counters. Raises: KernelError."""
        if path.kind != KIND:
            return
        record = pack_record(page)
        fd, former = self._records.get(path, (-1, b""))
        if record == former:
            return
        try:
            if fd < 0:
                fd = self._open(path)
            os.pwrite(fd, record, 0)  # in its place: a reader never finds a file that is empty
        except OSError as error:
            raise KernelError(f"show {path} to xentop by {self._link}", error.errno or errno.EIO) from None
        finally:
            if fd >= 0:
                self._records[path] = (fd, record)

    def keep_only(self, paths: Iterable[VbdPath]) -> None:
        """Remove the record of every vbd that is not among `paths`."""
        for path in self._records.keys() - set(paths):
            fd, _ = self._records.pop(path)
            os.close(fd)
            with suppress(OSError):
                self._file(path).unlink()

    def _open(self, path: VbdPath) -> int:
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not _leads_to(self._link, self._directory):
            self._link.symlink_to(self._directory)
        return os.open(self._file(path), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def _file(self, path: VbdPath) -> Path:
        return self._directory / f"vbd-{path.frontend_domid}-{path.devid}"


class XentopUpdates:
    """Updates the records every PERIOD_S, from `begin` on until there is no disk to show."""

    def __init__(
        self, loop: Reactor, xentop: Xentop | None, pages: Callable[[], Mapping[VbdPath, memoryview | None]]
    ) -> None:
        """`pages` returns the counters of all disks of that kind, None for one that has none now."""
        self._loop = loop
        self._xentop = xentop
        self._pages = pages
        self._timer = loop.timer(self._update)
        self._complaint = ""
        self._log = get_logger("xentop")
        if xentop is not None:
            xentop.clear()

    def begin(self) -> None:
        """Update the records from now on, because there is one more disk to show."""
        if self._xentop is not None and self._timer.due is None:
            self._timer.set(self._loop.now())

    def close(self) -> None:
        """Stop updating, and remove all records."""
        self._timer.set(None)
        if self._xentop is not None:
            self._xentop.clear()

    def _update(self) -> None:
        if self._xentop is None:
            return
        pages = self._pages()
        shown = {path: page for path, page in pages.items() if page is not None}
        self._xentop.keep_only(shown)
        try:
            for path, page in shown.items():
                self._xentop.show(path, page)
        except KernelError as error:
            if str(error) != self._complaint:
                self._log.warning(str(error))
            self._complaint = str(error)
        if pages:
            self._timer.set(self._loop.now() + PERIOD_S)


def _leads_to(link: Path, directory: Path) -> bool:
    try:
        return link.readlink() == directory
    except OSError:  # not a link, or gone meanwhile
        return False
