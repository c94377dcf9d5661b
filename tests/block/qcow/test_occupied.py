"""Images whose refcounts say that their tables are free: no table is overwritten, and the image says it is damaged."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import content, discard, flush, read, write
from tests.qcow_images import qcow, qcow2
from tests.recorded import Disk, RecordedFile, RecordedFiles, at
from xenbackend.block.formats.qcow import parse_header as parse_qcow
from xenbackend.block.formats.qcow2 import CORRUPT, Region, parse_header
from xenbackend.block.formats.qcow2_check import Check
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.block.formats.qcow2_tables import COPIED, OFFSET, pack_refcounts, unpack_refcounts, unpack_table
from xenbackend.block.qcow import occupied
from xenbackend.block.qcow.occupied import Occupied
from xenbackend.block.request import IMAGE_DAMAGED
from xenbackend.errors import DriverError

SIZE, CLUSTER_BITS = 4 << 20, 12
CLUSTER = 1 << CLUSTER_BITS
DATA = {number: bytes([1 + number]) * CLUSTER for number in range(4)} | {700: b"far" * 1365 + b"f"}


def looked_at(data: bytes) -> Check:
    """Return a finished check of an image."""
    check = Check(lambda offset, length: bytes(data[offset : offset + length]), len(data))
    check.run()
    return check


def freed(data: bytes, cluster: int) -> bytearray:
    """Return an image whose refcounts say that a cluster is free."""
    header = parse_header(lambda offset, length: data[offset : offset + length], len(data))
    index, inside = divmod(cluster, 1 << header.block_bits)
    block = unpack_table(data[header.refcount_table.offset :][: 8 * (index + 1)])[index]
    counts = unpack_refcounts(data[block : block + header.cluster_size], header.refcount_order)
    counts[inside] = 0
    changed = bytearray(data)
    changed[block : block + header.cluster_size] = pack_refcounts(counts, header.refcount_order)
    return changed


def opened(path: Path, data: bytes, *, layer: str = "qcow2", read_only: bool = False) -> tuple[Disk, RecordedFile]:
    """Return a disk on an image in memory, and its file."""
    file = RecordedFile(bytearray(data), Random(1))
    return Disk(f"{layer}:{at(path)}", RecordedFiles(**{str(path): file}), read_only=read_only), file


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("snapshot", [False, True])
def test_no_table_is_written_over(tmp_path: Path, version: int, *, snapshot: bool) -> None:
    """Whichever table's cluster is counted as free, nothing that the disk held or was answered is lost. A write that
    finds no other room fails with the error for a damaged image, and an image of version 3 is marked corrupt. A repair
    mends it.
    """
    image = qcow2(SIZE, DATA, cluster_bits=CLUSTER_BITS, version=version, snapshot=snapshot)
    tables = sorted(looked_at(image)._metadata)
    assert len(tables) > (8 if snapshot else 6)
    for cluster in tables:
        disk, file = opened(tmp_path / "x", freed(image, cluster))
        expected = bytearray(disk.everything())
        statuses = []
        for number in (100, 0, 701, 900):  # in an existing table, over data, beside data, in a new table
            statuses += disk.do(write(number * CLUSTER, b"new" * 1365 + b"n"))
            if not statuses[-1]:
                expected[number * CLUSTER : (number + 1) * CLUSTER] = b"new" * 1365 + b"n"
        disk.do(flush())
        assert expected == disk.everything(), cluster
        again, _ = opened(tmp_path / "x", bytes(file.bytes), read_only=True)

        assert expected == again.everything(), cluster
        assert IMAGE_DAMAGED in statuses, cluster
        assert set(statuses) <= {0, IMAGE_DAMAGED}
        assert (version == 3) == bool(parse_header(file.read_at, file.size).incompatible & CORRUPT)
        for offset, piece in (each for writes in plan_repair(looked_at(bytes(file.bytes))) for each in writes):
            file.write_at(offset, piece)
        mended, file = opened(tmp_path / "x", bytes(file.bytes))
        assert [0] == mended.do(write(100 * CLUSTER, b"new" * 1365 + b"n")), cluster
        assert 0 == looked_at(bytes(file.bytes)).report.errors


def test_a_sound_image_is_not_called_corrupt(tmp_path: Path) -> None:
    """A sound image is not called corrupt because its tables move, a snapshot keeps them, or their room is reused."""
    disk, file = opened(tmp_path / "x", qcow2(SIZE, DATA, cluster_bits=9, snapshot=True))
    chance = Random(3)
    for _ in range(400):
        assert [0] == disk.do(write(chance.randrange(SIZE >> 9) << 9, b"a" * 512))
        disk.do(flush())
    disk.chain.close()

    assert 0 == looked_at(bytes(file.bytes)).report.errors


@pytest.mark.parametrize("what", ["L1", "L2", "refcount table", "block", "twice", "snapshot"])
def test_tables_over_one_another_are_not_written(tmp_path: Path, what: str) -> None:
    """If a refcount block or an L2 table overlaps another table, writing one would destroy the other. Such an image can
    only be opened read-only.
    """
    image = bytearray(qcow2(SIZE, DATA, cluster_bits=CLUSTER_BITS, snapshot=True))
    header = parse_header(lambda offset, length: image[offset : offset + length], len(image))
    table, l1 = header.refcount_table.offset, header.l1.offset
    places = {"L1": l1, "refcount table": table, "L2": unpack_table(image[l1 : l1 + 8])[0]}
    places["block"] = unpack_table(image[table : table + 8])[0]
    places["snapshot"] = header.snapshots_offset
    if what == "twice":  # two entries of L1 point to one L2 table
        image[l1 + 8 : l1 + 16] = image[l1 : l1 + 8]
    else:
        image[table + 8 : table + 16] = places[what].to_bytes(8, "big")
    with pytest.raises(DriverError, match="two of its tables overlap, so it can only be opened read-only"):
        opened(tmp_path / "x", image)
    opened(tmp_path / "x", image, read_only=True)


def test_tables_that_take_long_to_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file can claim tables of any length. An image with too many is not opened for writing."""
    image = qcow2(SIZE, DATA, cluster_bits=CLUSTER_BITS, snapshot=True)
    monkeypatch.setattr(occupied, "MAX_TABLES", 8)
    with pytest.raises(DriverError, match="the tables of its snapshots or bitmaps have 16 bytes, more than 8"):
        opened(tmp_path / "x", image)
    opened(tmp_path / "x", image, read_only=True)


def test_a_table_of_version_1_behind_the_end_is_refused(tmp_path: Path) -> None:
    """If a table is beyond the end of the file, where new data would go, the image can only be opened read-only."""
    image = bytearray(qcow(SIZE, DATA, cluster_bits=CLUSTER_BITS))
    place = int.from_bytes(image[40:48], "big")
    image[place : place + 8] = len(image).to_bytes(8, "big")
    disk, _ = opened(tmp_path / "x", image, layer="qcow", read_only=True)
    request = read(0, CLUSTER)

    assert ([0], bytes(CLUSTER)) == (disk.do(request), content(request))
    with pytest.raises(DriverError, match="beyond the end of the file, where new data would go"):
        opened(tmp_path / "x", image, layer="qcow")


def test_tables_of_version_1_over_one_another_are_refused(tmp_path: Path) -> None:
    """If two L1 entries share a table, or a table overlaps another or L1, the image can only be opened read-only."""
    image = qcow(SIZE, DATA, cluster_bits=CLUSTER_BITS)
    place = int.from_bytes(image[40:48], "big")
    first = int.from_bytes(image[place : place + 8], "big")
    for table in (first, first + 512, place):
        changed = bytearray(image)
        changed[place + 8 : place + 16] = table.to_bytes(8, "big")
        with pytest.raises(DriverError, match="two of its tables overlap, so it can only be opened read-only"):
            opened(tmp_path / "x", changed, layer="qcow")
        opened(tmp_path / "x", changed, layer="qcow", read_only=True)


def test_what_is_occupied_is_found() -> None:
    """The first occupied cluster of a range is found. A cluster that two tables share is free once both are removed."""
    occupied = Occupied(12, [Region(0, 4096), Region(10 << 12, 5000)], [20 << 12, 30 << 12, 20 << 12, 0])
    found = [occupied.find(*span) for span in ((0, 1), (1, 10), (1, 11), (11, 12), (12, 20), (12, 21), (21, 99))]
    occupied.remove_table(20 << 12)
    once = occupied.find(12, 25)
    occupied.remove_table(20 << 12)
    occupied.remove_table(20 << 12)
    occupied.add_table(5 << 12)
    occupied.move(Region(10 << 12, 5000), Region(40 << 12, 1))

    assert [0, None, 10, 11, None, 20, 30] == found
    assert 20 == once
    assert [None, 5, None, 40] == [occupied.find(*span) for span in ((12, 25), (1, 20), (10, 20), (31, 99))]


def pointed(data: bytes, entry: int, place: int) -> bytearray:
    """Return an image whose first L2 table says that a cluster of the disk is at `place` and may be overwritten."""
    read = partial(read_of, data)
    is_v1 = data[4:8] == bytes([0, 0, 0, 1])
    l1 = (parse_qcow(read, len(data)) if is_v1 else parse_header(read, len(data))).l1
    table = unpack_table(data[l1.offset : l1.offset + 8])[0] & OFFSET
    changed = bytearray(data)
    changed[table + 8 * entry : table + 8 * entry + 8] = (place if is_v1 else place | COPIED).to_bytes(8, "big")
    return changed


def read_of(data: bytes, offset: int, length: int) -> bytes:
    """Read an image in memory."""
    return data[offset : offset + length]


@pytest.mark.parametrize(("layer", "version"), [("qcow2", 2), ("qcow2", 3), ("qcow", 1)])
def test_a_cluster_of_the_disk_that_is_a_table_is_not_written(tmp_path: Path, layer: str, version: int) -> None:
    """If an L2 table names one of the image's own tables as data, nobody can write to that cluster or free it. The rest
    of the disk can be read and written, but gets no new clusters once the image is marked corrupt.
    """
    if layer == "qcow":
        image = qcow(SIZE, DATA)
        header = parse_qcow(partial(read_of, image), len(image))
        tables = unpack_table(image[header.l1.offset : header.l1.offset + 8]).tolist()  # the others are in cluster 0
    else:
        image = qcow2(SIZE, DATA, cluster_bits=CLUSTER_BITS, version=version)
        tables = [place << CLUSTER_BITS for place in sorted(looked_at(image)._metadata) if place]
        assert len(tables) >= 5
    for place in tables:
        disk, file = opened(tmp_path / "x", pointed(image, 2, place), layer=layer)
        before = bytes(file.bytes[place : place + CLUSTER])
        request = read(2 * CLUSTER, CLUSTER)
        assert [0] == disk.do(request)
        assert before == content(request)
        for request in (
            write(2 * CLUSTER, b"!" * 512),
            write(2 * CLUSTER, b"!" * CLUSTER),
            discard(2 * CLUSTER, CLUSTER),
        ):
            assert disk.do(request) in ([IMAGE_DAMAGED], [errno.EOPNOTSUPP])
        assert [0] == disk.do(write(0, b"ours" * 128))
        assert [0] == disk.do(flush())
        disk.chain.close()
        after = bytes(file.bytes[place : place + CLUSTER])
        assert before == after, place
        if version == 3:
            found = parse_header(partial(read_of, bytes(file.bytes)), len(file.bytes))
            assert found.incompatible & CORRUPT
