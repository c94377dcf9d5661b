"""New images without data, for QEMU and for our own drivers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import qemu
from tests.image_content import disk_content, disk_write
from tests.qemu import qemu_img
from xenbackend.block.formats.blank import Parent, Wishes, blank
from xenbackend.block.formats.qcow2_check import check as check_qcow2
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import ConfigError
from xenbackend.opener.newfile import write_new

MIB = 1 << 20


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2", "qcow"])
@pytest.mark.parametrize("size", [512, 4 * MIB + 512, 1 << 40])
def test_a_new_image_is_one_for_qemu(tmp_path: Path, image_format: str, size: int) -> None:
    """QEMU sees the size that was asked for, to the byte, and nothing in it."""
    path = tmp_path / "new"
    write_new(str(path), blank(image_format, size, Wishes(), None))
    found = json.loads(qemu_img("info", "--output=json", "-f", FORMATS[image_format].qemu_name, path))

    assert size == found["virtual-size"]
    if image_format == "qcow2":
        assert (0, 0) == qemu.check(path)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_a_new_image_can_be_written(tmp_path: Path, image_format: str) -> None:
    """Its first and last sectors can be written and read by our driver, and by QEMU."""
    path, size = tmp_path / "new", 3 * MIB + 512
    write_new(str(path), blank(image_format, size, Wishes(), None))
    disk_write(f"{image_format}:{path}", {0: b"a" * 512, size - 512: b"z" * 512})

    assert b"a" * 512 + bytes(size - 1024) + b"z" * 512 == disk_content(f"{image_format}:{path}")
    qemu.qemu_io(path, FORMATS[image_format].qemu_name, "read -P 97 0 512", f"read -P 122 {size - 512} 512")


@pytest.mark.parametrize("cluster_size", [512, 4096, MIB])
def test_refcounts_are_right_for_any_cluster_size(tmp_path: Path, cluster_size: int) -> None:
    """An image with many tables counts them all, so that no check finds a fault."""
    path = tmp_path / "new"
    size = 2 << 30 if cluster_size == 512 else 1 << 40
    write_new(str(path), blank("qcow2", size, Wishes(cluster_size), None))
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        report = check_qcow2(read, path.stat().st_size)

    assert (0, 0) == (report.errors, report.leaks)
    if cluster_size > 512:
        assert (0, 0) == qemu.check(path)


def test_a_fixed_vhd_is_data_and_a_footer(tmp_path: Path) -> None:
    """The disk is at its beginning, as everybody expects."""
    path = tmp_path / "new"
    write_new(str(path), blank("vhd", MIB, Wishes(is_fixed=True), None))
    disk_write(f"vhd:{path}", {4096: b"x" * 512})

    assert (MIB + 512, b"x" * 512) == (path.stat().st_size, path.read_bytes()[4096:4608])
    qemu.qemu_io(path, "vpc", "read -P 120 4096 512")


@pytest.mark.parametrize(
    ("image_format", "size", "wishes", "sentence"),
    [
        ("raw", 1000, Wishes(), "multiple of 512"),
        ("qcow2", 0, Wishes(), "multiple of 512"),
        ("qcow2", MIB, Wishes(1000), "power of two from 512 B to 2 MiB"),
        ("qcow2", MIB, Wishes(4 * MIB), "power of two"),
        ("qcow", MIB, Wishes(MIB), "power of two from 512 B to 64 KiB"),
        ("vhd", MIB, Wishes(512), "power of two from 4 KiB"),
        ("vhd", (2040 << 30) + 512, Wishes(), "holds up to 2040 GiB.*other programs read no larger one; use qcow2"),
        ("vhd", 2 << 40, Wishes(is_fixed=True), "holds up to"),
        ("vhd", 1 << 30, Wishes(4 << 20), "a power of two from 4 KiB to 2 MiB"),
        ("vhd", 2 << 38, Wishes(4096), "choose larger ones"),
        ("qcow2", 1 << 50, Wishes(512), "choose larger ones"),
        ("raw", MIB, Wishes(4096), "neither clusters nor a parent"),
        ("qcow2", MIB, Wishes(is_fixed=True), "only a VHD image"),
    ],
)
def test_what_a_format_cannot_be_is_refused(image_format: str, size: int, wishes: Wishes, sentence: str) -> None:
    """Each wish that cannot be fulfilled has its sentence."""
    with pytest.raises(ConfigError, match=sentence):
        blank(image_format, size, wishes, None)


def test_a_parents_name_that_is_too_long_is_refused() -> None:
    """A header has room for 1023 bytes of a name at most, and for fewer where clusters are small."""
    for name, wishes in (("n" * 1024, Wishes()), ("n" * 400, Wishes(512))):
        with pytest.raises(ConfigError, match="parent's name"):
            blank("qcow2", MIB, wishes, Parent(name, "raw", "raw"))
