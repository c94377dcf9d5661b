"""The map of a disk: which ranges are stored where, compared with QEMU's map."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.image_content import disk_write
from tests.qcow_images import qcow2
from tests.qemu import qemu_img, qemu_io
from tests.vhd_images import UUID, image
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.formats.table import FORMATS
from xenbackend.block.spec import parse_chain
from xenbackend.cli.image_show import in_qemus_words
from xenbackend.errors import DriverError
from xenbackend.image.extents import extents_of, map_chain
from xenbackend.image.names import Image
from xenbackend.image.session import Session
from xenbackend.kernel import blockdev

pytestmark = pytest.mark.usefixtures("parents_anywhere")

Make = Callable[[str], Image]
MIB = 1 << 20
DATA = {64 << 10: 200 << 10, 3 << 20: 4096, (5 << 20) - 512: 512}  # the data in `raw`: offsets and lengths
FIELDS = ("start", "length", "depth", "zero", "data", "offset")


def extents(text: str) -> list[Extent]:
    """Return the map of a chain."""
    with Session() as session:
        return list(map_chain(session.open(parse_chain(text), read_only=True).chain.layers))


def from_qemu(path: Path, image_format: str) -> list[dict[str, Any]]:
    """Return QEMU's map without `present`, which it reports only for formats without parents."""
    found = json.loads(qemu_img("map", "--output=json", "-f", FORMATS[image_format].qemu_name, path))
    return [{key: each.get(key) for key in FIELDS} for each in found]


def as_qemu(found: list[Extent]) -> list[dict[str, Any]]:
    """Return our map in QEMU's terms."""
    return [{key: in_qemus_words(each).get(key) for key in FIELDS} for each in found]


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "cluster_size=512"),
        ("qcow2", "preallocation=metadata"),
        ("qcow2", "preallocation=falloc"),
        ("qcow", ""),
        ("vhd", "force_size=on"),
        ("vhd", "force_size=on,subformat=fixed"),
        ("vmdk", ""),
        ("vmdk", "zeroed_grain=on"),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vdi", ""),
        ("vdi", "static=on"),
    ],
)
def test_the_map_is_qemus(raw: Path, tmp_path: Path, image_format: str, options: str) -> None:
    """For every format that QEMU can map, our ranges are QEMU's, to the byte and with their offsets."""
    path, name = tmp_path / "img", FORMATS[image_format].qemu_name
    qemu_img("convert", "-f", "raw", "-O", name, *(["-o", options] if options else []), raw, path)
    if "streamOptimized" not in options:
        qemu_io(path, name, "write -z 2M 128k", "write -P 7 4M 1k")

    assert from_qemu(path, image_format) == as_qemu(
        extents(f"{'aio' if image_format == 'raw' else image_format}:{path}")
    )


def test_the_map_of_a_vhdx_has_more_than_qemus(raw: Path, tmp_path: Path) -> None:
    """QEMU calls all of a VHDX data. Our map shows missing blocks as zeros and holes in the file as holes."""
    path = tmp_path / "img"
    qemu_img("convert", "-f", "raw", "-O", "vhdx", raw, path)
    found = extents(f"vhdx:{path}")
    data = [(each.start, each.length) for each in found if not each.is_zeros]

    assert sum(length for _, length in data) < 256 << 10
    for place, length in DATA.items():
        assert any(start <= place and place + length <= start + size for start, size in data)


def test_all_holes_are_found_on_demand(tmp_path: Path) -> None:
    """With `all_holes`, as for a copy, every hole is found. Otherwise only those that QEMU's map has are."""
    path = tmp_path / "img"
    path.write_bytes(qcow2(MIB, {1: b"d" * 4096, 2: b"e" * 4096}))
    with Session() as session:
        layers = session.open(parse_chain(f"qcow2:{path}"), read_only=True).chain.layers
        place = next(each.place for each in map_chain(layers) if each.kind is Kind.DATA)
        assert place is not None
        punch(path, place + 4096, 4096)
        shown = [(each.start, each.length, each.is_hole) for each in map_chain(layers) if each.kind is Kind.DATA]
        wanted = map_chain(layers, all_holes=True)
        found = [(each.start, each.length, each.is_hole) for each in wanted if each.kind is Kind.DATA]

    assert [(4096, 8192, False)] == shown
    assert [(4096, 4096, False), (8192, 4096, True)] == found


def punch(path: Path, place: int, length: int) -> None:
    """Make a hole in a file."""
    fd = os.open(path, os.O_RDWR)
    try:
        blockdev.discard(fd, blockdev.examine(fd, str(path), read_only=False), place, length)
    finally:
        os.close(fd)


def test_damaged_refcounts_do_not_hide_where_data_are(tmp_path: Path) -> None:
    """Refcounts only decide whether to look for holes. If they cannot be read, the map is still that of the tables."""
    path = tmp_path / "img"
    data = bytearray(qcow2(MIB, {1: b"d" * 4096}))
    table = int.from_bytes(data[48:56], "big")
    data[table : table + 8] = (1).to_bytes(8, "big")
    path.write_bytes(data)

    assert [(0, Kind.ABSENT), (4096, Kind.DATA), (8192, Kind.ABSENT)] == [
        (each.start, each.kind) for each in extents(f"qcow2:{path}")
    ]


@pytest.mark.parametrize("end", [1 << 20, (1 << 20) - 24, (1 << 20) + 1])
def test_the_map_of_a_file_that_ends_inside_a_sector(tmp_path: Path, end: int) -> None:
    """The bytes that complete the last sector of such a file are zeros, as in QEMU."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 4096)
    os.truncate(path, 1 << 19)
    with path.open("ab") as file:
        file.write(b"y" * (end - (1 << 19)))

    assert from_qemu(path, "raw") == as_qemu(extents(f"aio:{path}"))


def test_the_map_of_a_chain_is_qemus(raw: Path, tmp_path: Path) -> None:
    """Each range belongs to the nearest image that has it, and to none beyond the parent's end."""
    path = tmp_path / "child"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", path, "8M")
    qemu_io(path, "qcow2", "write -P 3 0 64k", "write -z 128k 128k", "write -P 4 6M 8k")

    assert from_qemu(path, "qcow2") == as_qemu(extents(f"qcow2:{path}"))


def test_filters_are_passed_over_where_they_change_nothing(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `delay:`, zeros are still known to be zeros. Through a filter that may change data, all is data."""
    assert extents(f"aio:{raw}") == extents(f"delay:|aio:{raw}")
    with Session() as session:
        layers = session.open(parse_chain(f"delay:|aio:{raw}"), read_only=True).chain.layers
        monkeypatch.setattr(type(layers[0].driver), "is_transparent", False)
        found = list(map_chain(layers))

    assert [Extent(0, raw.stat().st_size, Kind.DATA)] == found


def test_compressed_clusters_are_data_without_a_place(raw: Path, tmp_path: Path) -> None:
    """Compressed clusters are data without an offset, since they cannot be read from the file as they are."""
    path = tmp_path / "compressed"
    path.write_bytes(qcow2(MIB, {1: b"d" * 4096}, compressed={3: b"c" * 4096}, zeros=[2]))
    found = [(each.start >> 12, each.length >> 12, each.kind, each.place is None) for each in extents(f"qcow2:{path}")]

    expected = [
        (0, 1, Kind.ABSENT, True),
        (1, 1, Kind.DATA, False),
        (2, 1, Kind.ZERO, True),
        (3, 1, Kind.DATA, True),
        (4, 252, Kind.ABSENT, True),
    ]
    assert expected == found


def test_a_vhd_child_has_sectors(tmp_path: Path) -> None:
    """In a differencing image, the bitmap says for each sector whether the image has it."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    base.write_bytes(image(4 * MIB, {0: {0: b"p" * 512}}))
    names = [(b"W2ru", ".\\base.vhd".encode("utf-16-le"))]
    child.write_bytes(image(4 * MIB, {0: {2: b"c" * 512}}, uuid=bytes(16), parent_uuid=UUID, names=names))
    disk_write(f"vhd:{child}", {3 * MIB: b"n" * 1024})
    with Session() as session:
        layers = session.open(parse_chain(f"vhd:{child}"), read_only=True).chain.layers
        own = [(each.start, each.length) for each in extents_of(layers[0]) if each.kind is Kind.DATA]
        depths = [(each.start, each.length, each.depth) for each in map_chain(layers) if each.kind is Kind.DATA]

    assert [(1024, 512), (3 * MIB, 1024)] == own
    assert [(0, 1024, 1), (1024, 512, 0), (1536, 2 * MIB - 1536, 1), (3 * MIB, 1024, 0)] == depths


def test_a_device_has_no_holes(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host cannot find holes, as in a block device, everything is data."""

    def unknown(_fd: int, _place: int, _whence: int) -> int:
        raise OSError(errno.EINVAL, "SEEK_DATA")

    monkeypatch.setattr(os, "lseek", unknown)

    assert [Extent(0, raw.stat().st_size, Kind.DATA, 0)] == extents(f"aio:{raw}")


def test_a_damaged_table_names_its_layer(tmp_path: Path) -> None:
    """If a table is damaged, the error names the layer of its image, even if that is a parent."""
    path, child = tmp_path / "img", tmp_path / "child"
    data = bytearray(qcow2(MIB, {1: b"d" * 4096}))
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 : l1 + 8] = (1 << 63 | 1 << 9).to_bytes(8, "big")
    path.write_bytes(data)
    child.write_bytes(qcow2(MIB, backing=b"img", backing_format=b"qcow2"))

    with pytest.raises(DriverError, match=f"qcow2:{path}: it is damaged"):
        extents(f"qcow2:{child}")


def test_what_nobody_knows_is_data() -> None:
    """A source that has no tables is data as a whole."""
    assert [Extent(0, MIB, Kind.DATA)] == extents("ram:1M")
