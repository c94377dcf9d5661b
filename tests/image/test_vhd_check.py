"""Whether a VHD image is sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.image_content import disk_content
from tests.vhd_images import fixed, image
from xenbackend.block.formats.vhd import SECTOR
from xenbackend.errors import DriverError
from xenbackend.image import vhd_check
from xenbackend.image.check import CLEAN, ERRORS, check, repair
from xenbackend.image.faults import Faults
from xenbackend.image.names import find_image

MIB = 1 << 20
BLOCKS = {0: {0: b"a" * 512}, 1: {5: b"b" * 512}}
STRIDE = 2 * MIB + 512


def look(data: bytes) -> Faults:
    """Check the bytes of an image."""
    return vhd_check.check(lambda offset, length: data[offset : offset + length], len(data))


@pytest.mark.parametrize("data", [image(8 * MIB, BLOCKS), image(8 * MIB), fixed(bytes(MIB)), image(8 * MIB, full=[0])])
def test_a_sound_image_has_no_fault(data: bytes) -> None:
    """As blktap lays it out, with and without its map of full blocks."""
    assert (0, 0) == (look(data).errors, look(data).leaks)


def test_room_between_blocks_is_lost(tmp_path: Path) -> None:
    """Where an entry of the table is gone, its block is room that nothing uses."""
    data = bytearray(image(8 * MIB, BLOCKS))
    data[1536:1540] = b"\xff" * 4

    assert (0, 1) == (look(bytes(data)).errors, look(bytes(data)).leaks)


def test_a_device_is_larger_than_its_image() -> None:
    """Behind an image on a block device there may be anything, and it is for blocks to come."""
    data = image(8 * MIB, BLOCKS) + b"?" * 8 * MIB
    found = vhd_check.check(lambda offset, length: data[offset : offset + length], len(data), on_device=True)

    assert (0, 0) == (found.errors, found.leaks)


@pytest.mark.parametrize("sectors", [1, 2 * STRIDE // SECTOR + 3])
def test_blocks_that_cannot_be_are_errors(sectors: int) -> None:
    """A block over the header, or behind the end of the file, is an error."""
    data = bytearray(image(8 * MIB, BLOCKS))
    data[1540:1544] = (sectors * 4).to_bytes(4, "big")

    assert 1 == look(bytes(data)).errors


@pytest.mark.parametrize("where", ["end", "beginning"])
def test_a_footer_that_is_gone_is_written_again(tmp_path: Path, where: str) -> None:
    """Either footer is made from the other one, and the disk holds what it held."""
    path = tmp_path / "img.vhd"
    data = image(8 * MIB, BLOCKS)
    path.write_bytes(data)
    text = f"vhd:{path}"
    before = disk_content(text)
    path.write_bytes(bytes(512) + data[512:] if where == "beginning" else data[:-SECTOR])

    assert ERRORS == check(find_image(text)).status
    assert CLEAN == repair(find_image(text)).status
    assert path.read_bytes()[:512] == path.read_bytes()[-512:] == data[:512]
    assert before == disk_content(text)


def test_a_file_that_was_cut_gets_the_end_of_its_block(tmp_path: Path) -> None:
    """A last block without its end is filled up with zeros, and a footer comes behind it."""
    path = tmp_path / "img.vhd"
    path.write_bytes(image(8 * MIB, BLOCKS)[: -MIB - 100])
    text = f"vhd:{path}"

    assert ERRORS == check(find_image(text)).status
    assert CLEAN == repair(find_image(text)).status
    assert b"b" * 512 == disk_content(text)[2 * MIB + 5 * 512 :][:512]


def test_a_fixed_image_that_is_too_short_is_not_repaired(tmp_path: Path) -> None:
    """Data that are gone cannot be made up."""
    path = tmp_path / "img.vhd"
    path.write_bytes(fixed(bytes(MIB))[4096:])

    assert ERRORS == check(find_image(f"vhd:{path}")).status
    with pytest.raises(DriverError, match="too short cannot be repaired"):
        repair(find_image(f"vhd:{path}"))
