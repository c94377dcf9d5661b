"""Which ranges of a disk are where, beside QEMU's map."""

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
from xenbackend.block.leaf import QEMU_NAMES
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.extents import Extent, Kind, extents_of, map_chain
from xenbackend.image.names import Image
from xenbackend.image.session import Session

Make = Callable[[str], Image]
MIB = 1 << 20


def extents(text: str) -> list[Extent]:
    """Return the map of a chain."""
    with Session() as session:
        return list(map_chain(session.open(parse_chain(text), read_only=True).chain.layers))


def from_qemu(path: Path, image_format: str) -> list[tuple[int, int, bool, bool, int, int | None]]:
    """Return QEMU's map: start, length, data, present, depth, offset; a hole has no offset that would mean anything."""
    found: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "-f", QEMU_NAMES[image_format], path))
    return [
        (each["start"], each["length"], each["data"], each["present"], each["depth"], each.get("offset"))
        for each in found
    ]


def as_qemu(found: list[Extent]) -> list[tuple[int, int, bool, bool, int, int | None]]:
    """Return our map in the same words."""
    return [
        (each.start, each.length, each.kind is Kind.DATA, each.kind is not Kind.ABSENT, each.depth, each.place)
        for each in found
    ]


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "qcow"])
def test_the_map_is_qemus(made: Make, raw: Path, image_format: str) -> None:
    """Of one image, the ranges are QEMU's, to the byte and with their places."""
    path = raw if image_format == "raw" else Path(made(image_format).path)
    text = f"aio:{raw}" if image_format == "raw" else f"{image_format}:{path}"

    assert from_qemu(path, image_format) == as_qemu(extents(text))


def test_a_vhds_map_has_qemus_data(made: Make, tmp_path: Path) -> None:
    """QEMU calls a block that is not there zeros; what is data, and where, is the same."""
    path = Path(made("vhd").path)
    ours = [each for each in as_qemu(extents(f"vhd:{path}")) if each[2]]

    assert ours == [each for each in from_qemu(path, "vhd") if each[2]]


def test_the_map_of_a_chain_is_qemus(raw: Path, tmp_path: Path) -> None:
    """With a parent, each range is the nearest image's that has it, and nobody's beyond the parent."""
    path = tmp_path / "child"
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", path, "8M")
    qemu_io(path, "qcow2", "write -P 3 0 64k", "write -z 128k 128k", "write -P 4 6M 8k")

    assert from_qemu(path, "qcow2") == as_qemu(extents(f"qcow2:{path}"))


def test_filters_are_passed_over_where_they_change_nothing(raw: Path) -> None:
    """Behind `delay:` zeros are zeros still; a filter that nobody knows may make anything of them."""
    assert extents(f"aio:{raw}") == extents(f"delay:|aio:{raw}")
    with Session() as session:
        layers = session.open(parse_chain(f"delay:|aio:{raw}"), read_only=True).chain.layers
        type(layers[0].driver).name = "unknown"
        try:
            found = list(map_chain(layers))
        finally:
            type(layers[0].driver).name = "delay"

    assert [Extent(0, raw.stat().st_size, Kind.DATA)] == found


def test_compressed_clusters_are_data_without_a_place(raw: Path, tmp_path: Path) -> None:
    """A compressed cluster is nowhere in the file that could be read as it is."""
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
    """In a differencing image the bitmap says of each sector whether it is there."""
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
    assert [(0, 512, 1), (1024, 512, 0), (3 * MIB, 1024, 0)] == depths


def test_a_device_has_no_holes(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host does not know of holes, as for a block device, all of it is data."""

    def unknown(_fd: int, _place: int, _whence: int) -> int:
        raise OSError(errno.EINVAL, "SEEK_DATA")

    monkeypatch.setattr(os, "lseek", unknown)

    assert [Extent(0, raw.stat().st_size, Kind.DATA, 0)] == extents(f"aio:{raw}")


def test_a_damaged_table_names_its_layer(tmp_path: Path) -> None:
    """A table that cannot be right is an error of the image that has it."""
    path, child = tmp_path / "img", tmp_path / "child"
    data = bytearray(qcow2(MIB, {1: b"d" * 4096}))
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 : l1 + 8] = (1 << 63 | 1 << 9).to_bytes(8, "big")
    path.write_bytes(data)
    child.write_bytes(qcow2(MIB, backing=b"img", backing_format=b"qcow2"))

    with pytest.raises(DriverError, match=f"qcow2:{path}: it is damaged"):
        extents(f"qcow2:{child}")


def test_what_nobody_knows_is_data() -> None:
    """A source without tables is read as a whole."""
    assert [Extent(0, MIB, Kind.DATA)] == extents("ram:1M")
