"""What `image info` reports about images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign_images import descriptor, vdi, vhdx, vmdk
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from tests.vhd_images import image as vhd_image
from xenbackend.block.formats.qcow2 import CORRUPT, DIRTY
from xenbackend.block.formats.table import FORMATS
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.create import create
from xenbackend.image.facts import chain_facts, file_facts
from xenbackend.image.looks import look_at
from xenbackend.image.names import Image, image_of_file
from xenbackend.image.session import Session

Make = Callable[[str], Image]


@pytest.mark.parametrize(("image_format", "says"), [("vhd", "VHD, dynamic"), ("qcow2", "QCOW2, version 3")])
def test_the_sizes_are_qemus(made: Make, image_format: str, says: str) -> None:
    """The sizes of the disk and its clusters, and the space that the file takes, are those that QEMU reports."""
    image = made(image_format)
    (found,) = chain_facts(image.chain).layers
    qemu = json.loads(qemu_img("info", "--output=json", "-f", FORMATS[image_format].qemu_name, image.path))

    assert (says, image.path) == (found.format, found.file)
    assert (qemu["virtual-size"], qemu["actual-size"]) == (found.virtual_size, found.allocated)
    assert qemu.get("cluster-size", 2 << 20) == found.cluster_size


def test_a_file_that_ends_inside_a_sector(tmp_path: Path) -> None:
    """If a file ends inside a sector, the disk's size is rounded up, and the file's size is its own."""
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    (layer,) = chain_facts(parse_chain(f"aio:{tmp_path}/odd")).layers

    assert (1024, 1000) == (layer.virtual_size, layer.file_size)


def test_parents_and_filters_are_layers(made: Make, raw: Path, tmp_path: Path) -> None:
    """Each layer is listed with its parent."""
    child = create("qcow2", f"{tmp_path}/child", None, parent=made("qcow"))
    found = chain_facts(parse_chain(f"delay:|{child.text}"))

    expected = [("delay", ""), ("QCOW2, version 3", f"qcow:{tmp_path}/disk.qcow"), ("QCOW, version 1", "")]
    assert expected == [(each.format, each.parent) for each in found.layers]
    raw_facts = chain_facts(image_of_file("raw", str(raw)).chain).layers[0]
    assert ("raw", raw.stat().st_size) == (raw_facts.format, raw_facts.file_size)


@pytest.mark.parametrize(("bits", "expected"), [(DIRTY, (True, False)), (CORRUPT, (False, True)), (0, (False, False))])
def test_bits_that_say_that_something_is_wrong(tmp_path: Path, bits: int, expected: tuple[bool, bool]) -> None:
    """An image that is marked dirty or corrupt, and so cannot be written, is shown with these marks."""
    path = tmp_path / "img"
    path.write_bytes(qcow2(1 << 20, incompatible=bits))
    (found,) = chain_facts(parse_chain(f"qcow2:{path}")).layers

    assert expected == (found.is_dirty, found.is_corrupt)


@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_in_use_is_looked_at(made: Make) -> None:
    """An image that is being written is shown as in use, and its writer is not disturbed."""
    image = made("vhd")
    with Session() as session:
        session.open(image.chain, read_only=False)
        assert chain_facts(image.chain).in_use
    assert not chain_facts(image.chain).in_use


def test_what_is_no_image_is_said(tmp_path: Path) -> None:
    """If a file is not an image of its layer's format, the facts have the reason, and claim no format."""
    path = tmp_path / "img"
    path.write_bytes(bytes(4096))
    facts = chain_facts(parse_chain(f"vhd:{path}"))

    assert "it is not a VHD image" in facts.problem
    assert [("", 0, 4096)] == [(each.format, each.virtual_size, each.file_size) for each in facts.layers]


def test_where_there_is_no_file_there_are_no_facts(tmp_path: Path) -> None:
    """A missing file or a directory is an error."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DriverError, match=str(path)):
            chain_facts(parse_chain(f"qcow2:{path}"))


@pytest.mark.usefixtures("parents_anywhere")
def test_a_parent_that_is_missing(tmp_path: Path) -> None:
    """If a parent is missing, all layers above it are shown, and its child with the name that it has for it."""
    for name, parent in (("mid", "gone"), ("top", "mid")):
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", parent, "-F", "qcow2", tmp_path / name, "1M")
    facts = chain_facts(parse_chain(f"delay:|qcow2:{tmp_path}/top"))

    expected = [
        ("delay:", 0, "", ()),
        (f"qcow2:{tmp_path}/top", 1 << 20, f"qcow2:{tmp_path}/mid", ()),
        (f"qcow2:{tmp_path}/mid", 1 << 20, "", ("gone",)),
    ]
    assert expected == [(each.layer, each.virtual_size, each.parent, each.parent_names) for each in facts.layers]
    assert "its parent is not there: the image names 'gone'" in facts.problem


def test_a_parent_that_nobody_allowed(tmp_path: Path) -> None:
    """A parent that must not be opened is named, and not looked at."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "secret").write_bytes(b"LUKS\xba\xbe\0\1".ljust(4096, b"!"))
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "../secret", "-F", "raw", tmp_path / "sub/a", "1M")
    facts = chain_facts(parse_chain(f"qcow2:{tmp_path}/sub/a"))

    assert [("QCOW2, version 3", ("../secret",))] == [(each.format, each.parent_names) for each in facts.layers]
    assert f"image trust LAYER, or with parents={tmp_path} in its layer" in facts.problem


@pytest.mark.usefixtures("parents_anywhere")
def test_a_parent_that_is_another_one(tmp_path: Path) -> None:
    """If a parent was replaced, both the child and the file in the parent's place are shown."""
    (tmp_path / "base").write_bytes(vhd_image(1 << 20, uuid=b"x" * 16))
    names = [(b"W2ru", ".\\base".encode("utf-16-le"))]
    (tmp_path / "a").write_bytes(vhd_image(1 << 20, uuid=b"c" * 16, parent_uuid=b"p" * 16, names=names))
    facts = chain_facts(parse_chain(f"vhd:{tmp_path}/a"))

    expected = [("VHD, differencing", f"vhd:{tmp_path}/base"), ("VHD, dynamic", "")]
    assert expected == [(each.format, each.parent) for each in facts.layers]
    assert "has another UUID" in facts.problem


@pytest.mark.parametrize(
    ("driver", "data", "expected"),
    [
        (
            "qcow2",
            qcow2(1 << 20, incompatible=1 << 50),
            ("QCOW2, version 3", 1 << 20, {"features": "number 50, unknown"}),
        ),
        ("vdi", vdi(1 << 20, {}, kind=4), ("VDI, differencing", 1 << 20, {})),
        ("vhdx", vhdx(4 << 20, {}, flags=2), ("VHDX, differencing", 4 << 20, {})),
        ("vmdk", descriptor('RW 8 SESPARSE "a"', create_type="seSparse"), ("VMDK, seSparse", 4096, {"files": "a"})),
    ],
)
def test_what_is_refused_has_its_facts(
    tmp_path: Path, driver: str, data: bytes, expected: tuple[str, int, dict[str, str]]
) -> None:
    """If an image is refused for a feature, everything that its headers say is shown."""
    (tmp_path / "a").write_bytes(data)
    facts = chain_facts(parse_chain(f"{driver}:{tmp_path}/a"))

    assert [expected] == [(each.format, each.virtual_size, each.more) for each in facts.layers]
    assert f"{driver}:{tmp_path}/a" in facts.problem


def test_formats_that_are_only_read_say_what_they_are(tmp_path: Path) -> None:
    """For a read-only format, the driver's report is shown as the format."""
    (tmp_path / "a.vmdk").write_bytes(vmdk(1 << 20, {}))
    (found,) = chain_facts(parse_chain(f"vmdk:{tmp_path}/a.vmdk")).layers

    assert ("VMDK, grains of 64 KiB", 1 << 20) == (found.format, found.virtual_size)


def test_a_file_that_no_driver_serves(tmp_path: Path) -> None:
    """A file that no driver serves is shown without a layer, with what to do."""
    (tmp_path / "a").write_bytes(b"QED\0" + bytes(60))
    facts = file_facts(f"{tmp_path}/a", look_at(f"{tmp_path}/a"))

    assert [("", "QED", 64)] == [(each.layer, each.format, each.file_size) for each in facts.layers]
    assert ("", "a QED image, which no driver serves; qemu-img convert" in facts.problem) == (facts.chain, True)
