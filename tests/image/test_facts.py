"""What an image is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from xenbackend.block.formats.qcow2 import CORRUPT, DIRTY
from xenbackend.block.leaf import QEMU_NAMES
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.create import create
from xenbackend.image.facts import chain_facts
from xenbackend.image.names import Image, image_of_file
from xenbackend.image.session import Session

Make = Callable[[str], Image]


@pytest.mark.parametrize(("image_format", "says"), [("vhd", "VHD, dynamic"), ("qcow2", "QCOW2, version 3")])
def test_the_sizes_are_qemus(made: Make, image_format: str, says: str) -> None:
    """Of the disk, of what the file takes, and of the clusters."""
    image = made(image_format)
    (found,) = chain_facts(image.chain).layers
    qemu = json.loads(qemu_img("info", "--output=json", "-f", QEMU_NAMES[image_format], image.path))

    assert (says, image.path) == (found.format, found.file)
    assert (qemu["virtual-size"], qemu["actual-size"]) == (found.virtual_size, found.allocated)
    assert qemu.get("cluster-size", 2 << 20) == found.cluster_size


def test_a_file_that_ends_inside_a_sector(tmp_path: Path) -> None:
    """The disk has whole sectors, the file what it has."""
    (tmp_path / "odd").write_bytes(b"x" * 1000)
    (layer,) = chain_facts(parse_chain(f"aio:{tmp_path}/odd")).layers

    assert (1024, 1000) == (layer.virtual_size, layer.file_size)


def test_parents_and_filters_are_layers(made: Make, raw: Path, tmp_path: Path) -> None:
    """Each layer is named, with the parent that it has."""
    child = create("qcow2", f"{tmp_path}/child", None, parent=made("qcow"))
    found = chain_facts(parse_chain(f"delay:|{child.text}"))

    expected = [("delay", ""), ("QCOW2, version 3", f"qcow:{tmp_path}/disk.qcow"), ("QCOW, version 1", "")]
    assert expected == [(each.format, each.parent) for each in found.layers]
    raw_facts = chain_facts(image_of_file("raw", str(raw)).chain).layers[0]
    assert ("raw", raw.stat().st_size) == (raw_facts.format, raw_facts.file_size)


@pytest.mark.parametrize(("bits", "expected"), [(DIRTY, (True, False)), (CORRUPT, (False, True)), (0, (False, False))])
def test_bits_that_say_that_something_is_wrong(tmp_path: Path, bits: int, expected: tuple[bool, bool]) -> None:
    """An image that cannot be written is looked at all the same."""
    path = tmp_path / "img"
    path.write_bytes(qcow2(1 << 20, incompatible=bits))
    (found,) = chain_facts(parse_chain(f"qcow2:{path}")).layers

    assert expected == (found.is_dirty, found.is_corrupt)


@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_in_use_is_looked_at(made: Make) -> None:
    """Who writes to it is not disturbed; that there is somebody is said."""
    image = made("vhd")
    with Session() as session:
        session.open(image.chain, read_only=False)
        assert chain_facts(image.chain).in_use
    assert not chain_facts(image.chain).in_use


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    """An image that is none is an error, not an empty answer."""
    path = tmp_path / "img"
    path.write_bytes(bytes(4096))

    with pytest.raises(DriverError, match="it is no VHD image"):
        chain_facts(parse_chain(f"vhd:{path}"))
