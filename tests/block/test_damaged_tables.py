"""Images with damaged refcounts or tables, written to by a guest: no table is ever overwritten.

`tests/image_places.py`, which shares no code with the package, finds out what lies where. An image may be refused, and
so may a write. A write that was answered must be readable afterwards, and so must everything that nobody wrote to. The
one damage that a disk in service cannot notice is data that are counted as free, or that lie beyond the end of the
file: their place may be handed out again, so only there may anything be found.

`--requests` sets the number of images; `make test-images` tries a hundred thousand of each format.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import pytest

from tests import image_places, qcow_images, qemu, vhd_images
from tests.helpers_block import content, flush, read, write
from tests.image_places import SECTOR, UNUSED, Places
from tests.recorded import Disk, RecordedFile, RecordedFiles, at
from xenbackend.block.request import IMAGE_DAMAGED
from xenbackend.errors import DriverError

SIZE = 96 << 10
BLOCK = 8 << 10  # of VHD
MARK = b"what a guest has"  # each sector that a guest writes begins with it
REFUSALS = {IMAGE_DAMAGED, errno.EIO, errno.ENOSPC, errno.EINVAL}
SHARES = 12  # so that a part of the suite tests a part of the images
JUDGED = 50  # qemu-img checks one in so many of the images all of whose data are counted
Damage = Callable[[bytearray, Places, Random], None]


@dataclass
class Case:
    """One damaged image and what became of it."""

    layer: str
    start: bytes
    before: Places
    file: RecordedFile
    expected: bytearray
    unknown: set[int] = field(default_factory=set)  # sectors of the disk that a refused write may have reached
    statuses: list[int] = field(default_factory=list)


# What is damaged.


def _clusters(chance: Random, cluster: int) -> dict[int, bytes]:
    count = SIZE // cluster
    return {number: chance.randbytes(8) * (cluster // 8) for number in chance.sample(range(count), count // 3)}


@cache
def sound(layer: str, variant: int) -> bytes:
    """Return a small image without a fault."""
    chance = Random(variant)
    if layer == "vhd":
        blocks = {
            number: {sector: data[sector * SECTOR :][:SECTOR] for sector in range(BLOCK // SECTOR)}
            for number, data in _clusters(chance, BLOCK).items()
        }
        full = sorted(blocks) if variant % 2 else None
        return vhd_images.image(SIZE, blocks, block_size=BLOCK, full=full)
    bits = 9 + variant % 3
    if layer == "qcow":
        return qcow_images.qcow(SIZE, _clusters(chance, 1 << bits), cluster_bits=bits, l2_bits=6)
    return qcow_images.qcow2(
        SIZE,
        _clusters(chance, 1 << bits),
        cluster_bits=bits,
        order=(4, 1, 6, 4, 3)[variant % 5],
        version=3 - variant % 4 // 3,
        snapshot=variant % 8 > 4,
        table_clusters=1,
    )


def damage_qcow2(image: bytearray, places: Places, chance: Random) -> None:
    """Change the refcounts of tables, of any clusters or of whole blocks, or move refcount blocks."""
    version, bits = image[7], image[23]
    order = image[99] if version > 2 else 4
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    used = [start >> bits for start, _ in places.tables]
    kind = chance.random()
    if kind < 0.5:  # tables only: no data may be lost
        clusters = chance.sample(used, chance.randint(1, min(4, len(used))))
    elif kind < 0.9:
        clusters = [chance.randrange(len(image) >> bits) for _ in range(chance.randint(1, 6))]
    else:
        first = chance.randrange(len(image) >> bits)
        clusters = list(range(first, min(len(image) >> bits, first + chance.randint(2, 60))))
    for cluster in clusters:
        _set_refcount(image, block, cluster, order, chance.choice((0, 0, 0, 1, 2, 3)), 1 << bits)
    if chance.random() < 0.1:  # a block that is full
        image[block : block + (1 << bits)] = b"\x55" * (1 << bits)
    if chance.random() < 0.2:  # a block that is moved, or missing
        place = table + 8 * chance.choice((0, 0, 1, 2))
        other = chance.choice((0, len(image), len(image) + (9 << bits), *(number << bits for number in used)))
        image[place : place + 8] = other.to_bytes(8, "big")


def _set_refcount(image: bytearray, block: int, cluster: int, order: int, count: int, size: int) -> None:
    bit = cluster << order
    if bit >= 8 * size:  # the place of another block
        return
    count = min(count, (1 << (1 << order)) - 1)
    if order >= 3:
        width = 1 << order - 3
        image[block + (bit >> 3) : block + (bit >> 3) + width] = count.to_bytes(width, "big")
    else:
        shift, mask = bit & 7, (1 << (1 << order)) - 1
        byte = image[block + (bit >> 3)]
        image[block + (bit >> 3)] = byte & ~(mask << shift) | count << shift


def damage_qcow(image: bytearray, places: Places, chance: Random) -> None:
    """Move tables or data beyond the end of the file, or truncate the file."""
    l1, end = int.from_bytes(image[40:48], "big"), len(image)
    cluster = places.cluster
    if chance.random() < 0.4:
        del image[chance.randrange(l1 + 64, end) :]
        end = len(image)
    if chance.random() < 0.5:
        place = l1 + 8 * chance.randrange(2)
        image[place : place + 8] = (end // cluster * cluster + chance.randrange(8) * cluster).to_bytes(8, "big")
    tables = [start for start, stop in places.tables if stop - start == 512 and start + 512 <= end]
    if tables and chance.random() < 0.5:
        place = chance.choice(tables) + 8 * chance.randrange(64)
        image[place : place + 8] = (-(-end // cluster) * cluster + chance.randrange(8) * cluster).to_bytes(8, "big")


def damage_vhd(image: bytearray, places: Places, chance: Random) -> None:
    """Move blocks, names, the table or the map anywhere, or remove the footer at the end."""
    end = len(image)
    count = SIZE // BLOCK
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        sector = chance.choice((UNUSED, chance.randrange(end // 512 + 40), image[1536 + 3], 1, 2, 3, 4))
        if chance.random() < 0.5:  # the place of another block, or near it
            other = 1536 + 4 * chance.randrange(count)
            sector = int.from_bytes(image[other : other + 4], "big") + chance.choice((0, 0, 1, -1, 17))
        place = 1536 + 4 * chance.randrange(count)
        image[place : place + 4] = (sector & UNUSED).to_bytes(4, "big")
    for number in range(chance.choice((0, 0, 1, 2))):  # names, which may be those of no parent
        offset = chance.choice((end, end - 512, chance.randrange(end + 4 * BLOCK), 1536, 512, 2048)) // 512 * 512
        locator = b"W2ku" + chance.choice((1, 512, 2048)).to_bytes(4, "big") + bytes(8) + offset.to_bytes(8, "big")
        image[512 + 576 + 24 * number : 512 + 600 + 24 * number] = locator
    if chance.random() < 0.1:
        table = chance.choice((512, 1024, 2048, end - 512, end - 1024, chance.randrange(end) // 512 * 512))
        image[512 + 16 : 512 + 24] = table.to_bytes(8, "big")
        if chance.random() < 0.7 and table < end - 64:
            image[table : table + 4 * count] = b"\xff" * (4 * count)
    if image[2048:2056] == b"tdbatmap" and chance.random() < 0.2:
        place = chance.choice((0, 512, 1024, 1536, 2048, end - 512, end, chance.randrange(end) // 512 * 512))
        image[2056:2064] = place.to_bytes(8, "big")
        image[2072:2076] = (~sum(image[place : place + 512]) & UNUSED).to_bytes(4, "big")
    image[512 + 36 : 512 + 40] = bytes(4)
    image[512 + 36 : 512 + 40] = (~sum(image[512:1536]) & UNUSED).to_bytes(4, "big")
    if chance.random() < 0.1:
        del image[chance.choice((-512, -1024, -chance.randrange(1, 2 * BLOCK))) :]


DAMAGE: dict[str, Damage] = {"qcow2": damage_qcow2, "qcow": damage_qcow, "vhd": damage_vhd}
READERS: dict[str, Callable[[bytes], Places]] = {
    "qcow2": image_places.qcow2,
    "qcow": image_places.qcow,
    "vhd": image_places.vhd,
}


# What a guest does.


def run(layer: str, path: str, chance: Random) -> Case | None:
    """Damage an image and let a guest write to it. Return None if it is refused; nothing was written then."""
    image = bytearray(sound(layer, chance.randrange(16)))
    DAMAGE[layer](image, READERS[layer](bytes(image)), chance)
    start = bytes(image)
    file = RecordedFile(image, chance)
    try:
        disk = Disk(f"{layer}:{path}", RecordedFiles(**{path: file}))
    except DriverError:
        assert start == file.bytes[: len(start)]
        return None
    before = READERS[layer](start)
    case = Case(layer, start, before, file, before.disk(start, SIZE))
    for number in before.partial:
        case.unknown.update(range(number * before.cluster // SECTOR, (number + 1) * before.cluster // SECTOR))
    for _ in range(chance.randint(1, 3)):
        _write(case, disk, chance)
    found = read(0, SIZE)
    if [0] == disk.do(found):
        _compare(case, content(found), READERS[layer](bytes(file.bytes)), "reads")
    disk.chain.close()
    return case


def _write(case: Case, disk: Disk, chance: Random) -> None:
    batch = []
    for _ in range(chance.randint(1, 4)):
        offset = chance.randrange(SIZE // SECTOR) * SECTOR
        length = min(chance.choice((1, 1, 2, 8, 17)) * SECTOR, SIZE - offset)
        if all(offset + length <= each.offset or each.offset + each.length <= offset for each in batch):
            batch.append(write(offset, b"".join(MARK + chance.randbytes(8) * 62 for _ in range(length // SECTOR))))
    statuses = disk.do(*batch)
    for request, status in zip(batch, statuses, strict=True):
        span = range(request.offset // SECTOR, (request.offset + request.length) // SECTOR)
        if status:
            case.unknown.update(span)
        else:
            case.expected[request.offset : request.offset + request.length] = content(request)
            case.unknown.difference_update(span)
    if chance.random() < 0.5:
        statuses += disk.do(flush())
    case.statuses += statuses


# What is a fault.


def look(case: Case) -> None:
    """Find guest data in a table's place, tables that were changed without right, and lost data."""
    file = bytes(case.file.bytes)
    after = READERS[case.layer](file)
    assert set(case.statuses) <= REFUSALS | {0}
    for start, end in case.before.tables & after.tables:
        assert MARK not in file[start:end], f"a guest's data lie over the table at {start}"
    for start, end in case.before.frozen:
        assert case.start[start:end] == file[start:end], f"the snapshot's table at {start} was written over"
    for start, end in after.tables:
        is_visible = start // after.cluster * after.cluster not in case.before.uncounted
        assert MARK not in file[start:end] or not is_visible, f"a guest's data lie over the new table at {start}"
    _compare(case, bytes(after.disk(file, SIZE)), after, "holds")
    if case.before.snapshot and not case.before.uncounted:
        kept = case.before.disk(case.start, SIZE, of_snapshot=True)
        assert kept == after.disk(file, SIZE, of_snapshot=True), "the snapshot has changed"


def _compare(case: Case, found: bytes, after: Places, verb: str) -> None:
    if found == case.expected:
        return
    shared = {place for place, count in Counter(after.data.values()).items() if count > 1}
    hidden = case.before.uncounted | shared  # what only a check can find
    invisible = {number for number, place in {**case.before.data, **after.data}.items() if place in hidden}
    invisible |= {number for number, place in case.before.data.items() if place in hidden}
    for sector in range(SIZE // SECTOR):
        span = slice(sector * SECTOR, (sector + 1) * SECTOR)
        if found[span] != case.expected[span] and sector not in case.unknown:
            assert sector * SECTOR // after.cluster in invisible, f"the disk {verb} something else in sector {sector}"


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("layer", DAMAGE)
@pytest.mark.rows("D10")
def test_no_table_is_written_over(layer: str, share: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Whatever refcounts and tables say, guest data never overwrite a table, and no answered data are lost."""
    is_long = request.config.getoption("--long")
    count = request.config.getoption("--requests") // (10 if is_long else 100) // SHARES + 1
    path, judge = at(tmp_path / "image"), layer == "qcow2" and shutil.which("qemu-img")
    written = refused = 0
    for number in range(count):
        seed = f"{request.config.getoption('--seed')} {share} {number}"
        case = run(layer, path, Random(seed))
        if case is None:
            continue
        try:
            look(case)
        except AssertionError as error:
            raise AssertionError(f"{layer} {seed!r}: {error}") from error
        written += 1
        refused += IMAGE_DAMAGED in case.statuses
        if judge and not number % JUDGED and not case.before.uncounted:
            assert judged(case.file.bytes, tmp_path) <= judged(case.start, tmp_path), seed
    assert count < 1000 or written > count // 8
    assert count < 1000 or refused or layer == "qcow"


def judged(image: bytes | bytearray, directory: Path) -> int:
    """Return the number of errors that qemu-img finds."""
    (directory / "judged").write_bytes(image)
    return qemu.check(directory / "judged")[0]
