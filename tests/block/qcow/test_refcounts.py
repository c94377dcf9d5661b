"""Allocation and freeing of clusters: refcounts in the file are never too low, and soon exact again."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import content, discard, flush, read, write
from tests.qcow_images import qcow2
from tests.recorded import Disk, RecordedFile, RecordedFiles, at
from xenbackend.block.formats.qcow2 import parse_header
from xenbackend.block.formats.qcow2_check import Report, check

SIZE = 4 << 20
CLUSTER = 512


def opened(path: Path, data: bytes, **options: bool) -> tuple[Disk, RecordedFile]:
    """Return a disk on an image in memory, and its file."""
    file = RecordedFile(bytearray(data), Random(1), **options)
    return Disk(f"qcow2:{at(path)}", RecordedFiles(**{str(path): file})), file


def looked_at(file: RecordedFile) -> Report:
    """Return what a check finds in the file as it is now."""
    return check(lambda offset, length: bytes(file.bytes[offset : offset + length]), file.size)


@pytest.mark.parametrize("order", range(7))
def test_right_after_closing(tmp_path: Path, order: int) -> None:
    """After a disk was written and closed, no refcount is too low or too high, whatever their width."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, cluster_bits=9, order=order))
    assert [0] * 3 == disk.do(write(0, b"a" * 4096), write(SIZE - 512, b"b" * 512), write(1 << 20, b"c" * 512))
    disk.chain.close()
    report = looked_at(file)

    assert (0, 0) == (report.errors, report.leaks)


@pytest.mark.slow
def test_the_table_grows(tmp_path: Path) -> None:
    """A full refcount table is replaced by a larger one, and every cluster keeps its count."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, cluster_bits=9, order=6, table_clusters=1))
    before = parse_header(file.read_at, file.size).refcount_table
    pieces = [Random(place).randbytes(128 * 1024) for place in range(24)]
    assert [0] == disk.do(*(write(place * len(piece), piece) for place, piece in enumerate(pieces)))[:1]
    everything = disk.everything()
    disk.do(flush())
    disk.chain.close()
    report = looked_at(file)

    assert parse_header(file.read_at, file.size).refcount_table.length > before.length
    assert b"".join(pieces) == everything[: 24 * 128 * 1024]
    assert (0, 0) == (report.errors, report.leaks)


def test_what_is_freed_is_used_again(tmp_path: Path) -> None:
    """Discarded clusters are free after a flush and are used next, so the file does not grow."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, cluster_bits=12))
    data = Random(4).randbytes(1 << 20)
    disk.do(write(0, data))
    disk.do(discard(0, len(data)), flush())
    size = 0
    for turn in range(8):
        disk.do(write(turn % 2 << 20, data))
        disk.do(discard(turn % 2 << 20, len(data)))
        disk.do(flush())
        size = size or file.size
    disk.chain.close()

    assert file.size <= size + (4 << 20)
    assert (0, 0) == (looked_at(file).errors, looked_at(file).leaks)


def test_nothing_is_free_before_a_flush(tmp_path: Path) -> None:
    """A discarded cluster keeps its refcount until a flush, because the table in the file may still refer to it."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, {0: b"a" * 4096}, cluster_bits=12))
    disk.do(discard(0, 4096))
    assert 1 == looked_at(file).leaks
    disk.do(flush())
    assert 0 == looked_at(file).leaks


def test_many_discards_without_a_flush(tmp_path: Path) -> None:
    """If much was freed without a flush, a discard flushes by itself, so a guest cannot pile up waiting clusters."""
    disk, file = opened(tmp_path / "x", qcow2(8 << 20, cluster_bits=9))
    data = bytes([1]) * (5 << 20)
    assert [0] * 5 == disk.do(*(write(place << 20, data[: 1 << 20]) for place in range(5)))
    disk.do(discard(0, len(data)))

    assert (0, True) == (looked_at(file).errors, looked_at(file).leaks < 3000)


def test_a_killed_writer_leaks_little(tmp_path: Path) -> None:
    """A killed writer leaks only the clusters that were reserved ahead and not used: a megabyte at first."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, cluster_bits=12))
    disk.do(write(0, b"a" * 4096))
    report = looked_at(file)

    assert 0 == report.errors
    assert 200 < report.leaks <= 256


def test_a_full_device(tmp_path: Path) -> None:
    """On a block device, clusters up to its end are used. After that, writes that need new ones end with ENOSPC."""
    data = qcow2(SIZE, {0: b"a" * 4096}, cluster_bits=12)
    disk, file = opened(tmp_path / "x", data.ljust(len(data) + 10 * 4096, b"\xee"), is_device=True)
    statuses = [disk.do(write(number * 4096, b"b" * 4096))[0] for number in range(20)]
    disk.chain.close()

    assert [0] * 11 + [errno.ENOSPC] * 9 == statuses
    assert (0, 0) == (looked_at(file).errors, looked_at(file).leaks)


def test_used_clusters_of_a_device_are_filled_up(tmp_path: Path) -> None:
    """The old content of a new cluster's place never shows: there are zeros around what was written."""
    data = qcow2(SIZE, cluster_bits=12)
    disk, _ = opened(tmp_path / "x", data.ljust(len(data) + 10 * 4096, b"\xee"), is_device=True)
    disk.do(write(1024, b"b" * 512))
    request = read(0, 4096)
    disk.do(request)

    assert bytes(1024) + b"b" * 512 + bytes(4096 - 1536) == content(request)
