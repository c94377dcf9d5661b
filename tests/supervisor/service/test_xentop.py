"""What xentop is shown: the record's layout, and that the records of others are left alone."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import Clock, settle
from xenbackend import counters
from xenbackend.errors import KernelError
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.service.xentop import PERIOD_S, Xentop, XentopUpdates, pack_record
from xenbackend.supervisor.xenstore.paths import VbdPath

DISK = VbdPath("vbd3", 0, 5, 51712)
OTHER = VbdPath("vbd3", 0, 5, 51728)
PID = 4711


class Vbd3Stats(ctypes.Structure):
    """The record as Xen's tools/libs/stat/xenstat_priv.h declares it."""

    _fields_ = (
        ("version", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("oo_reqs", ctypes.c_uint64),
        ("read_reqs_submitted", ctypes.c_uint64), ("read_reqs_completed", ctypes.c_uint64),
        ("read_sectors", ctypes.c_uint64), ("read_total_ticks", ctypes.c_uint64),
        ("write_reqs_submitted", ctypes.c_uint64), ("write_reqs_completed", ctypes.c_uint64),
        ("write_sectors", ctypes.c_uint64), ("write_total_ticks", ctypes.c_uint64),
        ("io_errors", ctypes.c_uint64), ("flags", ctypes.c_uint64),
    )  # fmt: skip


def page(**values: int) -> memoryview:
    """Return counters with these values."""
    words = memoryview(bytearray(counters.SIZE)).cast("Q")
    for name, value in values.items():
        words[counters.INDEX[name]] = value
    return words.cast("B")


@pytest.fixture
def shared_memory(tmp_path: Path) -> Path:
    """Return a directory that stands for /dev/shm."""
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def xentop(tmp_path: Path, shared_memory: Path) -> Iterator[Xentop]:
    """Return a `Xentop` that shows nothing yet."""
    xentop = Xentop(tmp_path / "run" / "xentop", shared_memory, PID)
    yield xentop
    xentop.clear()


def test_record() -> None:
    """Each counter is in the field where libxenstat looks for it, with bytes as sectors; all other fields are 0."""
    record = pack_record(
        page(reads=3, writes=5, read_bytes=12288, written_bytes=1024, errors=2, flushes=9, in_flight=7)
    )
    stats = Vbd3Stats.from_buffer_copy(record)
    said = {name: value for name, _ in Vbd3Stats._fields_ if (value := getattr(stats, name))}

    assert ctypes.sizeof(Vbd3Stats) == len(record)
    assert {
        "version": 1,
        "read_reqs_submitted": 3,
        "read_reqs_completed": 3,
        "read_sectors": 24,
        "write_reqs_submitted": 5,
        "write_reqs_completed": 5,
        "write_sectors": 2,
        "io_errors": 2,
    } == said


def test_record_is_where_libxenstat_looks(xentop: Xentop, shared_memory: Path) -> None:
    """The record's path has the number that stands in `kthread-pid`, the domain and the device; the record follows the
    counters.
    """
    path = shared_memory / f"td3-{PID}" / "vbd-5-51712"
    xentop.show(DISK, page(reads=1))
    first = path.read_bytes()
    xentop.show(DISK, page(reads=2))

    assert [pack_record(page(reads=1)), pack_record(page(reads=2))] == [first, path.read_bytes()]


def test_what_did_not_change_is_not_written(xentop: Xentop, shared_memory: Path) -> None:
    """A record whose counters have not changed is not written again."""
    path = shared_memory / f"td3-{PID}" / "vbd-5-51712"
    xentop.show(DISK, page(reads=1))
    path.write_bytes(b"untouched")
    xentop.show(DISK, page(reads=1))

    assert b"untouched" == path.read_bytes()


def test_other_kinds_are_not_shown(xentop: Xentop, shared_memory: Path) -> None:
    """A disk of kind vbd has no record, as nothing looks for one."""
    xentop.show(VbdPath("vbd", 0, 5, 51712), page())

    assert [] == list(shared_memory.iterdir())


def test_forgotten_disks_leave_nothing(xentop: Xentop, shared_memory: Path) -> None:
    """A disk that is no longer shown leaves neither a record nor a descriptor."""
    before = len(open_descriptors())
    for disk in (DISK, OTHER):
        xentop.show(disk, page())
    xentop.keep_only([OTHER, VbdPath("vbd3", 0, 9, 9)])
    kept = [path.name for path in (shared_memory / f"td3-{PID}").iterdir()]
    xentop.keep_only([])
    xentop.keep_only([])

    assert ["vbd-5-51728"] == kept
    assert before == len(open_descriptors())
    assert [] == list((shared_memory / f"td3-{PID}").iterdir())


def test_killed_services_leavings_are_removed(xentop: Xentop, tmp_path: Path, shared_memory: Path) -> None:
    """A service removes the records that a killed one has left, and leaves those of tapdisk."""
    xentop.show(DISK, page())
    tapdisks = shared_memory / "td3-99"
    tapdisks.mkdir()
    (tapdisks / "vbd-1-51712").write_bytes(b"tapdisk's")
    foreign = shared_memory / "td3-98"
    foreign.symlink_to(tapdisks)
    successor = Xentop(tmp_path / "run" / "xentop", shared_memory, PID + 1)
    successor.clear()
    after = sorted(path.name for path in shared_memory.iterdir())
    successor.show(OTHER, page())
    records = [path.name for path in (shared_memory / f"td3-{PID + 1}").iterdir()]
    successor.clear()

    assert ["td3-98", "td3-99"] == after
    assert ["vbd-5-51728"] == records
    assert ["td3-98", "td3-99"] == sorted(path.name for path in shared_memory.iterdir())
    assert b"tapdisk's" == (tapdisks / "vbd-1-51712").read_bytes()
    assert not (tmp_path / "run" / "xentop").exists()


def test_foreign_directory_is_not_touched(tmp_path: Path, shared_memory: Path) -> None:
    """If somebody else has the directory for our process number, that is an error, and it is left alone."""
    (shared_memory / f"td3-{PID}").mkdir()
    xentop = Xentop(tmp_path / "xentop", shared_memory, PID)
    with pytest.raises(KernelError, match=r"td3-4711: File exists"):
        xentop.show(DISK, page())
    xentop.clear()

    assert (shared_memory / f"td3-{PID}").is_dir()
    assert not (tmp_path / "xentop").exists()


def test_record_that_cannot_be_kept(tmp_path: Path, xentop: Xentop) -> None:
    """If a record cannot be made, that is an error, and the next try succeeds once the obstacle is gone."""
    (tmp_path / "run").write_text("a file")
    with pytest.raises(KernelError, match=r"show vbd3/5/51712 to xentop by .*: Not a directory"):
        xentop.show(DISK, page())
    (tmp_path / "run").unlink()
    xentop.show(DISK, page(reads=1))

    assert pack_record(page(reads=1)) == (tmp_path / "run" / "xentop" / "vbd-5-51712").read_bytes()


def test_updates_come_now_and_then_while_there_is_a_disk(xentop: Xentop, shared_memory: Path) -> None:
    """Records are updated periodically from the first disk until there is none left; then all are removed."""
    clock, asked = Clock(), []
    loop = Reactor(clock)
    pages: dict[VbdPath, memoryview | None] = {DISK: None, OTHER: page(reads=1)}

    def look() -> dict[VbdPath, memoryview | None]:
        asked.append(clock.time)
        return pages

    updates = XentopUpdates(loop, xentop, look)
    settle(loop)
    updates.begin()
    updates.begin()
    settle(loop)
    first = [path.name for path in (shared_memory / f"td3-{PID}").iterdir()]
    clock.time += PERIOD_S
    settle(loop)
    pages.clear()
    clock.time += PERIOD_S
    settle(loop)
    second = list((shared_memory / f"td3-{PID}").iterdir())
    clock.time += 10 * PERIOD_S
    settle(loop)
    updates.close()
    loop.close()

    assert (["vbd-5-51728"], []) == (first, second)
    assert [100.0, 100.0 + PERIOD_S, 100.0 + 2 * PERIOD_S] == asked


def test_a_record_that_cannot_be_kept_is_told_once(xentop: Xentop, shared_memory: Path, lines: io.StringIO) -> None:
    """If a record cannot be kept, that is logged once, however often it is tried."""
    (shared_memory / f"td3-{PID}").mkdir()
    clock = Clock()
    loop = Reactor(clock)
    updates = XentopUpdates(loop, xentop, lambda: {DISK: page()})
    updates.begin()
    for _ in range(3):
        settle(loop)
        clock.time += PERIOD_S
    updates.close()
    loop.close()

    assert 1 == lines.getvalue().count("File exists")
