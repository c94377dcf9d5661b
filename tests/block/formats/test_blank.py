"""New images without data, for QEMU and for our own drivers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import qemu
from tests.block.formats.test_vhd import reader
from tests.image_content import disk_content, disk_write
from tests.qemu import qemu_img
from xenbackend.block.formats import vhd
from xenbackend.block.formats.blank import Blank, Parent, Wishes, blank, vhd_with_parent
from xenbackend.block.formats.qcow2_check import check as check_qcow2
from xenbackend.block.formats.table import FORMATS
from xenbackend.block.formats.vhd_names import parent_names
from xenbackend.errors import ConfigError
from xenbackend.opener.newfile import write_new

MIB = 1 << 20


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2", "qcow"])
@pytest.mark.parametrize("size", [512, 4 * MIB + 512, 1 << 40])
def test_a_new_image_is_one_for_qemu(tmp_path: Path, image_format: str, size: int) -> None:
    """QEMU sees a new image with exactly the size asked for and no content."""
    path = tmp_path / "new"
    write_new(str(path), blank(image_format, size, Wishes(), None))
    found = json.loads(qemu_img("info", "--output=json", "-f", FORMATS[image_format].qemu_name, path))

    assert size == found["virtual-size"]
    if image_format == "qcow2":
        assert (0, 0) == qemu.check(path)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_a_new_image_can_be_written(tmp_path: Path, image_format: str) -> None:
    """The first and last sectors of a new image can be written and read by our driver and by QEMU."""
    path, size = tmp_path / "new", 3 * MIB + 512
    write_new(str(path), blank(image_format, size, Wishes(), None))
    disk_write(f"{image_format}:{path}", {0: b"a" * 512, size - 512: b"z" * 512})

    assert b"a" * 512 + bytes(size - 1024) + b"z" * 512 == disk_content(f"{image_format}:{path}")
    qemu.qemu_io(path, FORMATS[image_format].qemu_name, "read -P 97 0 512", f"read -P 122 {size - 512} 512")


@pytest.mark.parametrize("cluster_size", [512, 4096, MIB])
def test_refcounts_are_right_for_any_cluster_size(tmp_path: Path, cluster_size: int) -> None:
    """In a new image with many tables, all of them are counted, so that no check finds a fault."""
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
    """In a fixed VHD the disk begins at offset 0, where every program expects it."""
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
        ("qcow", 9 << 40, Wishes(), "9 TiB is too much for clusters of 4 KiB in this format; choose larger"),
        ("raw", MIB, Wishes(4096), "neither clusters nor a parent"),
        ("qcow2", MIB, Wishes(is_fixed=True), "only a VHD image"),
    ],
)
def test_what_a_format_cannot_be_is_refused(image_format: str, size: int, wishes: Wishes, sentence: str) -> None:
    """Wishes that a format cannot fulfil are refused, each with a message of its own."""
    with pytest.raises(ConfigError, match=sentence):
        blank(image_format, size, wishes, None)


def test_a_parents_name_that_is_too_long_is_refused() -> None:
    """A name of more than 1023 bytes, or fewer in small clusters, does not fit into a header and is refused."""
    for image_format, length, cluster_size in (("qcow2", 1024, 0), ("qcow2", 400, 512), ("qcow", 1024, 0)):
        with pytest.raises(ConfigError, match=f"the parent's name has {length} bytes, too many for the image's header"):
            blank(image_format, MIB, Wishes(cluster_size), Parent("n" * length, "raw", "raw"))


def written(image: Blank) -> bytes:
    """Return the bytes of a new file."""
    data = bytearray(image.size)
    for place, piece in image.pieces:
        data[place : place + len(piece)] = piece
    return bytes(data)


@pytest.mark.parametrize("image_format", ["qcow2", "qcow"])
def test_the_longest_name_of_a_parent(image_format: str) -> None:
    """A parent's name of 1023 bytes is stored to its last byte."""
    assert b"n" * 1023 + bytes(8) in written(blank(image_format, MIB, Wishes(), Parent("n" * 1023, "raw", "raw")))


@pytest.mark.parametrize("name", ["base.vhd", "../b\u00e4se 1%20.vhd", "n" * 400, "/srv/images/base.vhd"])
def test_the_parent_of_a_vhd(name: str) -> None:
    """A parent's name is read back unchanged. An absolute one is not stored in the locators for relative names."""
    parent = Parent(name, "vhd", "vpc", uuid=b"p" * 16, mtime=vhd.EPOCH + 7.5)
    data = written(blank("vhd", 8 * MIB, Wishes(), parent))
    footer, _ = vhd.read_footer(reader(data), len(data))
    header = vhd.read_header(reader(data), footer, len(data))
    is_absolute = name.startswith("/")

    assert (name if is_absolute else f"./{name}") in parent_names(reader(data), header, len(data))
    assert [b"MacX", b"W2ku", *([] if is_absolute else [b"W2ru"])] == [each.code for each in header.locators]
    assert (vhd.DIFFERENCING, b"p" * 16, 7) == (footer.type, header.parent_uuid, header.parent_timestamp)


@pytest.mark.parametrize("name", ["b\udcff.vhd", "/srv/\udcfe/base.vhd"])
def test_a_parents_name_that_is_no_text(name: str) -> None:
    """A name that is not Unicode text is refused: in a VHD image it would be no name, or another file's."""
    with pytest.raises(
        ConfigError, match="as names in it must be Unicode text; rename the parent, or make a qcow2 image"
    ):
        blank("vhd", 8 * MIB, Wishes(), Parent(name, "vhd", "vpc"))


def test_a_vhd_loses_its_parent() -> None:
    """Without a parent, nothing of a former one is left in the header."""
    without = vhd.Header(1536, 4, 2 * MIB)
    parent = Parent("base.vhd", "vhd", "vpc", uuid=b"p" * 16, mtime=vhd.EPOCH + 7)
    header, names = vhd_with_parent(without, 2048, parent)

    assert names
    assert (without, b"") == vhd_with_parent(header, 2048, None)
