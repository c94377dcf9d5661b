"""The check of QCOW images of version 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image_content import disk_write
from xenbackend.errors import DriverError
from xenbackend.image import qcow_check
from xenbackend.image.faults import Faults
from xenbackend.image.names import Image

Make = Callable[[str], Image]


@pytest.fixture
def data(made: Make) -> bytearray:
    """Return an image."""
    return bytearray(Path(made("qcow").path).read_bytes())


def look(data: bytes) -> Faults:
    """Check the bytes of an image."""
    return qcow_check.check(lambda offset, length: bytes(data[offset : offset + length]), len(data))


def table_of(data: bytes) -> int:
    """Return the offset of the first L2 table."""
    l1 = int.from_bytes(data[40:48], "big")
    return int.from_bytes(data[l1 : l1 + 8], "big")


def test_a_sound_image_has_no_fault(data: bytearray, made: Make) -> None:
    """Images of QEMU, and images that our driver has written to, have no fault."""
    assert (0, 0) == (look(data).errors, look(data).leaks)
    image = made("qcow")
    disk_write(image.text, {2 << 20: b"n" * 8192})
    written = Path(image.path).read_bytes()
    assert (0, 0) == (look(written).errors, look(written).leaks)


@pytest.mark.parametrize("entry", [1 << 40, 4096 + 512, 1 << 63 | 1 << 52])
def test_a_cluster_outside_of_the_file_is_an_error(data: bytearray, entry: int) -> None:
    """A cluster outside of the file, compressed or not, or at an unaligned offset is an error."""
    table = table_of(data)
    data[table : table + 8] = entry.to_bytes(8, "big")

    assert 1 == look(data).errors


def test_a_table_outside_of_the_file_is_an_error(data: bytearray) -> None:
    """A table outside of the file is one error. Its clusters are not looked at."""
    l1 = int.from_bytes(data[40:48], "big")
    data[l1 : l1 + 8] = (1 << 40).to_bytes(8, "big")

    assert 1 == look(data).errors


def test_two_users_of_a_cluster_are_an_error(data: bytearray) -> None:
    """A cluster that two entries use is an error."""
    table = table_of(data)
    data[table : table + 8] = data[table + 8 * 16 : table + 8 * 17]

    assert 1 == look(data).errors


def test_room_that_nothing_uses_is_lost(data: bytearray) -> None:
    """Clusters that no table refers to are leaks."""
    table = table_of(data)
    data[table + 8 * 16 : table + 8 * 48] = bytes(8 * 32)

    assert (0, 32) == (look(data).errors, look(data).leaks)


def test_what_is_no_image_is_refused() -> None:
    """A file of another format is refused."""
    with pytest.raises(DriverError, match="not a QCOW image"):
        look(bytes(4096))
