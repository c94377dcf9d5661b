"""Which ranges of a disk an image has, which are zeros, and which of its parents has the rest.

Must not read a disk's data. The order is that of the disk, and what follows on and is alike is one extent.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from xenbackend.block.chain import OpenLayer
from xenbackend.block.driver import File
from xenbackend.block.drivers.aio import Aio
from xenbackend.block.drivers.qcow import Qcow
from xenbackend.block.drivers.qcow2 import Qcow2
from xenbackend.block.drivers.vhd import Vhd
from xenbackend.block.formats import qcow, qcow2, vhd
from xenbackend.block.formats.qcow2_tables import unpack_table
from xenbackend.block.formats.vhd_tables import unpack_bitmap
from xenbackend.block.mapped.tables import OWNED, PLACE, READABLE, SPECIAL
from xenbackend.block.qcow.codec import Version1, Version2
from xenbackend.errors import DriverError

TRANSPARENT = frozenset({"log", "delay", "fault"})  # filters that pass data on as it is


class Kind(Enum):
    """What an image has of a range."""

    DATA = "data"
    ZERO = "zero"  # it says that there are zeros
    ABSENT = "absent"  # the parent's, or zeros


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a disk in bytes. `depth` 0 is the image itself, 1 its parent; `place` is where in that file it is."""

    start: int
    length: int
    kind: Kind
    place: int | None = None  # not known, or compressed
    depth: int = 0

    @property
    def end(self) -> int:
        """Where it ends, in bytes."""
        return self.start + self.length


def map_chain(layers: Sequence[OpenLayer]) -> Iterator[Extent]:
    """Yield what the disk of a chain is made of; ABSENT is what nobody has, and reads as zeros.

    Raises: DriverError, where a table is damaged; OSError.
    """
    places = [place for place, each in enumerate(layers) if not each.driver.is_filter]
    found: Iterator[Extent] = iter(())
    for place in reversed(places):
        found = _over(extents_of(layers[place]), found)
    filters = {each.driver.name for each in layers[: places[0]]}
    if not filters <= TRANSPARENT:  # what it makes of zeros, only reading can tell
        found = iter([Extent(0, layers[0].geometry.size, Kind.DATA)])
    return _merged(found)


def extents_of(layer: OpenLayer) -> Iterator[Extent]:
    """Yield what one image has itself; all of it is data where there is no way to know. Raises: as `map_chain`."""
    try:
        yield from _merged(_own(layer))
    except DriverError as error:
        error.layer = error.layer or layer.text
        raise


def _own(layer: OpenLayer) -> Iterator[Extent]:
    driver, size = layer.driver, layer.geometry.size
    if isinstance(driver, Aio):
        return _holes(driver.options.file, size)
    if isinstance(driver, Vhd):
        is_fixed = driver.footer.type == vhd.FIXED
        return _holes(driver.options.file, size) if is_fixed else _blocks(driver, size)
    if isinstance(driver, (Qcow, Qcow2)):
        return _clusters(driver.file, size, is_v1=isinstance(driver, Qcow))
    return iter([Extent(0, size, Kind.DATA)])


def _holes(path: str, size: int) -> Iterator[Extent]:
    """Ask the file system; a block device has no holes. The descriptor takes no lock: whoever opened the layer has."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        place = 0
        while place < size:
            data = min(size, _seek(fd, place, os.SEEK_DATA, size))
            if data > place:
                yield Extent(place, data - place, Kind.ZERO, place)
            end = min(size, _seek(fd, data, os.SEEK_HOLE, size)) if data < size else size
            if end > data:
                yield Extent(data, end - data, Kind.DATA, data)
            place = end
    finally:
        os.close(fd)


def _seek(fd: int, place: int, whence: int, size: int) -> int:
    try:
        return os.lseek(fd, place, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return size
        if error.errno == errno.EINVAL:  # a block device, or a file system that does not know: all of it is data
            return place if whence == os.SEEK_DATA else size
        raise


def _blocks(driver: Vhd, size: int) -> Iterator[Extent]:
    block, bitmap = driver.header.block_size, driver.header.bitmap_size
    for number, entry in enumerate(driver.entries):
        start, place = number * block, entry & PLACE
        length = min(block, size - start)
        if not entry:
            yield Extent(start, length, Kind.ABSENT)
        elif entry & OWNED == OWNED:
            yield Extent(start, length, Kind.DATA, place)
        else:
            sectors = unpack_bitmap(driver.file.read_at(place - bitmap, bitmap), length // vhd.SECTOR)
            yield from _sectors(sectors, start, place)


def _sectors(present: bytearray, start: int, place: int) -> Iterator[Extent]:
    first = 0
    while first < len(present):
        after = present.find(1 - present[first], first)
        after = len(present) if after < 0 else after
        inside, length = first * vhd.SECTOR, (after - first) * vhd.SECTOR
        if present[first]:
            yield Extent(start + inside, length, Kind.DATA, place + inside)
        else:
            yield Extent(start + inside, length, Kind.ABSENT)
        first = after


def _clusters(file: File, size: int, *, is_v1: bool) -> Iterator[Extent]:
    header = qcow.parse_header(file.read_at, file.size) if is_v1 else qcow2.parse_header(file.read_at, file.size)
    codec = Version1(header) if isinstance(header, qcow.Header) else Version2(header)
    cluster, per_table = header.cluster_size, 1 << codec.l2_bits
    span = cluster * per_table
    for number, word in enumerate(unpack_table(file.read_at(header.l1.offset, header.l1.length))):
        start = number * span
        if start >= size:
            return
        table, _ = codec.decode_l1(word)
        if not table:
            yield Extent(start, min(span, size - start), Kind.ABSENT)
            continue
        data = file.read_at(table, 8 * per_table)
        entries = codec.decode_l2(unpack_table(data + bytes(8 * per_table - len(data))))
        for first, count, entry in _runs(entries[: -(-(size - start) // cluster)], cluster):
            place = start + first * cluster
            yield _run(entry, place, min(count * cluster, size - place))


def _runs(entries: Sequence[int], cluster: int) -> Iterator[tuple[int, int, int]]:
    """Yield first index, count and first entry of those that are alike and follow one another in the file."""
    first, expected = 0, entries[0]
    for index, entry in enumerate(entries):
        if entry != expected:
            yield first, index - first, entries[first]
            first = index
        expected = entry + cluster if entry & READABLE else entry
    yield first, len(entries) - first, entries[first]


def _run(entry: int, start: int, length: int) -> Extent:
    if entry & READABLE:
        return Extent(start, length, Kind.DATA, entry & PLACE)
    if entry & SPECIAL:
        return Extent(start, length, Kind.DATA)
    return Extent(start, length, Kind.ZERO if entry else Kind.ABSENT)


def _over(child: Iterable[Extent], parent: Iterator[Extent]) -> Iterator[Extent]:
    """Yield a child's extents, with its parent's where it has none itself."""
    current = next(parent, None)
    for extent in child:
        if extent.kind is not Kind.ABSENT:
            yield extent
            continue
        place = extent.start
        while place < extent.end:
            while current is not None and current.end <= place:
                current = next(parent, None)
            if current is None:  # behind the end of the parent
                yield Extent(place, extent.end - place, Kind.ABSENT)
                break
            end = min(extent.end, current.end)
            yield _deeper(_cut(current, place, end))
            place = end


def _deeper(extent: Extent) -> Extent:
    return extent if extent.kind is Kind.ABSENT else replace(extent, depth=extent.depth + 1)


def _cut(extent: Extent, start: int, end: int) -> Extent:
    place = None if extent.place is None else extent.place + start - extent.start
    return replace(extent, start=start, length=end - start, place=place)


def _merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for extent in extents:
        if last is not None and _continues(last, extent):
            last = replace(last, length=last.length + extent.length)
        else:
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def _continues(last: Extent, extent: Extent) -> bool:
    if (last.kind, last.depth) != (extent.kind, extent.depth):
        return False
    return extent.place == (None if last.place is None else last.place + last.length)
