"""The repair of refcounts: afterwards no fault is found, and a kill in the middle does no harm."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests import qemu
from tests.qcow_images import qcow2
from xenbackend.block.formats.common import Write
from xenbackend.block.formats.qcow2 import parse_header
from xenbackend.block.formats.qcow2_check import Check, Report
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.errors import DriverError

SIZE = 1 << 20
CLUSTERS = {0: b"a" * 4096, 7: b"b" * 4096, 100: b"c" * 4096}


def looked_at(data: bytes | bytearray) -> Check:
    """Return a finished check."""
    check = Check(lambda offset, length: bytes(data[offset : offset + length]), len(data))
    check.run()
    return check


def faults(report: Report) -> int:
    """Return the number of dangerous faults in a report. A COPIED flag that is missing is not dangerous."""
    return report.low_refcounts + report.broken


def write(data: bytearray, writes: list[Write]) -> None:
    """Apply the writes."""
    for offset, piece in writes:
        data.extend(bytes(max(0, offset + len(piece) - len(data))))
        data[offset : offset + len(piece)] = piece


def broken(kind: str, order: int) -> bytearray:
    """Return an image whose refcounts are wrong in one way."""
    data = bytearray(qcow2(SIZE, CLUSTERS, order=order, incompatible={"dirty": 1, "corrupt": 2}.get(kind, 0)))
    header = parse_header(lambda offset, length: bytes(data[offset : offset + length]), len(data))
    (block,) = struct.unpack_from(">Q", data, header.refcount_table.offset)
    (l1,) = struct.unpack_from(">Q", data, header.l1.offset)
    l2 = l1 & (1 << 56) - 512
    if kind == "leaked":
        data[l2 : l2 + 8] = bytes(8)
    elif kind in ("low", "corrupt"):
        data[block : block + 8] = bytes(8)
    elif kind == "flag":
        data[l2] ^= 0x80
    elif kind == "dirty":
        data[header.refcount_table.offset : header.refcount_table.offset + 8] = bytes(8)
    elif kind == "shared":
        data[l2 + 8 : l2 + 16] = data[l2 : l2 + 8]
    return data


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["leaked", "low", "flag", "dirty", "corrupt", "shared"])
def test_repaired(tmp_path: Path, kind: str, order: int) -> None:
    """After a repair neither we nor qemu-img find a fault, and the image is not marked dirty or corrupt any more."""
    data = broken(kind, order)
    check = looked_at(data)
    assert check.report.errors + check.report.leaks
    for writes in plan_repair(check):
        write(data, writes)
    report = looked_at(data).report
    (tmp_path / "image").write_bytes(data)

    assert (0, 0, False, False) == (report.errors, report.leaks, report.is_dirty, report.is_corrupt)
    assert (0, 0) == qemu.check(tmp_path / "image")


@pytest.mark.parametrize("kind", ["leaked", "low", "flag", "dirty", "corrupt", "shared"])
def test_killed_while_mending(kind: str) -> None:
    """After any first part of the repair's writes there are no more dangerous faults than before."""
    data = broken(kind, 4)
    check = looked_at(data)
    before = faults(check.report)
    for writes in plan_repair(check):
        for each in writes:
            write(data, [each])
            assert faults(looked_at(data).report) <= before


def test_a_sound_image_needs_nothing_but_its_own_blocks() -> None:
    """Repairing a sound image changes no byte of it."""
    data = bytearray(qcow2(SIZE, CLUSTERS))
    for writes in plan_repair(looked_at(data)):
        write(data, writes)

    assert qcow2(SIZE, CLUSTERS) == data


def test_what_is_not_mended() -> None:
    """An image whose tables lead nowhere is not repaired."""
    data = qcow2(SIZE, CLUSTERS).replace(b"\x80\0\0\0\0\0\x50\0", b"\x80\0\1\0\0\0\x50\0")
    with pytest.raises(DriverError, match="more than its refcounts are damaged"):
        plan_repair(looked_at(data))


def test_a_refcount_table_that_is_too_small() -> None:
    """If clusters in use are beyond what the refcount table can count, the image is not repaired in place."""
    small = qcow2(64 << 10, {0: b"a" * 512}, cluster_bits=9, order=6, table_clusters=1)
    counted = 64 * 64 * 512  # bytes: the table has 64 entries, and a block counts 64 clusters

    def with_last_cluster_in_use(size: int) -> Check:
        data = bytearray(small.ljust(size, b"\0"))
        (l2,) = struct.unpack_from(">Q", data, looked_at(data).header.l1.offset)
        struct.pack_into(">Q", data, (l2 & (1 << 56) - 512) + 8, size - 512 | 1 << 63)
        return looked_at(data)

    assert plan_repair(with_last_cluster_in_use(counted - 4096))
    with pytest.raises(DriverError, match="its refcount table is too small for the file; qemu-img check -r all"):
        plan_repair(with_last_cluster_in_use(counted + 512))


def test_refcounts_that_would_not_fit() -> None:
    """If a cluster has two users and refcounts have one bit, the image is not repaired."""
    data = broken("shared", 0)
    with pytest.raises(DriverError, match="used 2 times, but its refcounts only go up to 1"):
        plan_repair(looked_at(data))
