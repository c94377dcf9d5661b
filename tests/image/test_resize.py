"""Growing disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from tests.vhd_images import image as vhd_image
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.images import QEMU_NAMES
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image import resize as module
from xenbackend.image.check import CLEAN, check
from xenbackend.image.create import create
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.resize import resize
from xenbackend.image.session import Session

Make = Callable[[str], Image]
MIB = 1 << 20


def grown(raw: Path, size: int) -> bytes:
    """Return what the disk reads as when it is larger, and make the raw image so."""
    os.truncate(raw, size)
    return raw.read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2", "qcow"])
def test_what_is_new_is_zeros(made: Make, raw: Path, tmp_path: Path, image_format: str) -> None:
    """The disk holds what it held, then zeros up to its new end, for QEMU too; and all of it can be written."""
    image = image_of_file("raw", str(raw)) if image_format == "raw" else made(image_format)
    before, size = raw.stat().st_size, 37 * MIB + 512

    assert before == resize(image, size)
    expected = bytearray(grown(raw, size))
    assert expected == disk_content(image.text)
    if image_format == "raw":
        return
    assert_same_for_qemu(Path(image.path), image_format, raw)
    assert CLEAN == check(image).status
    disk_write(image.text, {size - 512: b"z" * 512})
    expected[-512:] = b"z" * 512
    assert expected == disk_content(image.text)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_tables_that_are_too_small_are_moved(tmp_path: Path, image_format: str) -> None:
    """With small clusters a larger disk needs another table; what was written stays where it is on the disk."""
    path = f"{tmp_path}/img"
    small = {"vhd": 64 << 10, "qcow2": 512, "qcow": 512}[image_format]
    create(image_format, path, MIB, Wishes(small))
    image = image_of_file(image_format, path)
    disk_write(image.text, {0: b"a" * 4096, MIB - 512: b"m" * 512})
    resize(image, 200 * MIB)
    disk_write(image.text, {150 * MIB: b"n" * 512})

    with Session() as session:
        assert session.open(image.chain, read_only=True).size == 200 * MIB
    assert CLEAN == check(image).status
    qemu.qemu_io(
        Path(path),
        QEMU_NAMES[image_format],
        "read -P 97 0 4k",
        f"read -P 109 {MIB - 512} 512",
        f"read -P 110 {150 * MIB} 512",
        f"read -P 0 {MIB} {140 * MIB}",
    )
    if image_format == "qcow2":
        assert (0, 0) == qemu.check(Path(path))


def test_a_fixed_vhd_grows(tmp_path: Path) -> None:
    """Its footer moves to the new end, and where it was there are zeros."""
    image = find_image(create("vhd", f"{tmp_path}/img", MIB, Wishes(is_fixed=True)).text)
    disk_write(image.text, {MIB - 512: b"m" * 512})
    resize(image, 2 * MIB)

    assert bytes(MIB - 512) + b"m" * 512 + bytes(MIB) == disk_content(image.text)
    found = json.loads(qemu_img("info", "--output=json", "-f", "vpc", image.path))
    assert 2 * MIB == found["virtual-size"]


def test_a_disk_never_becomes_smaller(made: Make) -> None:
    """A smaller size is refused, the same one does nothing, and an odd one cannot be."""
    image = made("qcow2")
    before = Path(image.path).read_bytes()
    with pytest.raises(ConfigError, match="5 MiB and cannot become smaller"):
        resize(image, 4 * MIB)
    with pytest.raises(ConfigError, match="multiple of 512"):
        resize(image, 6 * MIB + 1)
    resize(image, 5 * MIB)

    assert before == Path(image.path).read_bytes()


def test_a_parent_does_not_show(raw: Path, tmp_path: Path) -> None:
    """A child that is smaller than its parent would show more of it, and is refused."""
    child = create("qcow2", f"{tmp_path}/child", MIB, parent=image_of_file("raw", str(raw)))
    with pytest.raises(ConfigError, match="parent is larger"):
        resize(find_image(child.text), 2 * MIB)


def test_what_cannot_grow_is_refused(tmp_path: Path) -> None:
    """Snapshots in version 2, a map of full blocks that is too small: a sentence, and nothing else."""
    path = tmp_path / "img"
    cases = [
        ("qcow2", bytes(qcow2(MIB, {1: b"d" * 4096}, version=2, snapshot=True)), "version 2 with snapshots"),
        ("vhd", vhd_image(8 * MIB, {0: {0: b"a" * 512}}, full=[0]), "map of full blocks"),
    ]
    for image_format, content, sentence in cases:
        path.write_bytes(content)
        image = image_of_file(image_format, str(path))
        with pytest.raises(DriverError, match=sentence):
            resize(image, 1 << 30)
        assert content == path.read_bytes()[: len(content)]


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_whoever_is_killed_leaves_a_whole_image(
    tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write of a move the disk is of the old size or the new one, holds what it held, and has no error."""
    create(image_format, f"{tmp_path}/img", MIB, Wishes({"vhd": 64 << 10}.get(image_format, 512)))
    image = image_of_file(image_format, f"{tmp_path}/img")
    disk_write(image.text, {0: b"a" * 512})
    content, left = Path(image.path).read_bytes(), 0
    write_plan = module.write_plan

    def killed(file: module.File, plan: list[list[module.Write]]) -> None:
        nonlocal left
        for writes in plan:
            for write in writes:
                if not left:
                    raise OSError(errno.EIO, "killed")
                left -= 1
                write_plan(file, [[write]])

    monkeypatch.setattr(module, "write_plan", killed)
    for after in range(100):
        Path(image.path).write_bytes(content)
        left = after
        try:
            resize(image, 50 * MIB)
        except OSError:
            assert check(image).errors <= (image_format == "vhd")  # the footers may differ for a moment
            with Session() as session:
                size = session.open(image.chain, read_only=True).size
            assert size in (MIB, 50 * MIB)
            assert b"a" * 512 == disk_content(image.text, 512)
        else:
            break

    assert after > 1
    assert CLEAN == check(image).status
