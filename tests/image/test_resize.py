"""Growing disks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import loops, qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from tests.vhd_images import image as vhd_image
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image import resize as module
from xenbackend.image import writing
from xenbackend.image.check import CLEAN, check
from xenbackend.image.create import create
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.resize import resize
from xenbackend.image.session import Session
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.opening import Facts

Make = Callable[[str], Image]
MIB = 1 << 20


def grown(raw: Path, size: int) -> bytes:
    """Extend the raw image, and return its new content."""
    os.truncate(raw, size)
    return raw.read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2", "qcow"])
def test_what_is_new_is_zeros(made: Make, raw: Path, tmp_path: Path, image_format: str) -> None:
    """The disk keeps its content, shows zeros up to its new end, for QEMU too, and can be written there."""
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
    """If a larger disk needs a longer table, that is moved, and the disk keeps its content."""
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
        FORMATS[image_format].qemu_name,
        "read -P 97 0 4k",
        f"read -P 109 {MIB - 512} 512",
        f"read -P 110 {150 * MIB} 512",
        f"read -P 0 {MIB} {140 * MIB}",
    )
    if image_format == "qcow2":
        assert (0, 0) == qemu.check(Path(path))


def test_a_fixed_vhd_grows(tmp_path: Path) -> None:
    """The footer moves to the new end, and zeros take its former place."""
    image = find_image(create("vhd", f"{tmp_path}/img", MIB, Wishes(is_fixed=True)).text)
    disk_write(image.text, {MIB - 512: b"m" * 512})
    resize(image, 2 * MIB)

    assert bytes(MIB - 512) + b"m" * 512 + bytes(MIB) == disk_content(image.text)
    found = json.loads(qemu_img("info", "--output=json", "-f", "vpc", image.path))
    assert 2 * MIB == found["virtual-size"]


def test_a_disk_never_becomes_smaller(made: Make) -> None:
    """A smaller size, or one that is not a multiple of a sector, is refused. The same size changes nothing."""
    image = made("qcow2")
    before = Path(image.path).read_bytes()
    with pytest.raises(ConfigError, match="5 MiB and cannot shrink"):
        resize(image, 4 * MIB)
    with pytest.raises(ConfigError, match="multiple of 512"):
        resize(image, 6 * MIB + 1)
    resize(image, 5 * MIB)

    assert before == Path(image.path).read_bytes()


def test_a_parent_does_not_show(raw: Path, tmp_path: Path) -> None:
    """A child that is smaller than its parent cannot grow, because more of the parent would show."""
    child = create("qcow2", f"{tmp_path}/child", MIB, parent=image_of_file("raw", str(raw)))
    with pytest.raises(ConfigError, match="parent is larger"):
        resize(find_image(child.text), 2 * MIB)


def test_what_cannot_grow_is_refused(tmp_path: Path) -> None:
    """Snapshots in version 2, or a map of full blocks that is too small: growth is refused, and nothing is changed."""
    path = tmp_path / "img"
    cases = [
        ("qcow2", bytes(qcow2(MIB, {1: b"d" * 4096}, version=2, snapshot=True)), "version 2 that has snapshots"),
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
    """Killed after any write, the disk has its old size or the new one, keeps its content, and has no error."""
    create(image_format, f"{tmp_path}/img", MIB, Wishes({"vhd": 64 << 10}.get(image_format, 512)))
    image = image_of_file(image_format, f"{tmp_path}/img")
    disk_write(image.text, {0: b"a" * 512})
    content, left = Path(image.path).read_bytes(), 0
    write_plan = writing.write_plan

    def killed(file: module.File, plan: list[list[module.Write]]) -> None:
        nonlocal left
        for writes in plan:
            for write in writes:
                if not left:
                    raise OSError(errno.EIO, "killed")
                left -= 1
                write_plan(file, [[write]])

    monkeypatch.setattr(writing, "write_plan", killed)
    for after in range(100):
        Path(image.path).write_bytes(content)
        left = after
        try:
            resize(image, 50 * MIB)
        except OSError:
            assert check(image).errors <= (image_format == "vhd")  # for a moment, the two footers may differ
            with Session() as session:
                size = session.open(image.chain, read_only=True).size
            assert size in (MIB, 50 * MIB)
            assert b"a" * 512 == disk_content(image.text, 512)
        else:
            break

    assert after > 1
    assert CLEAN == check(image).status


# Block devices cannot become longer, but have room behind what the image uses.


@pytest.fixture
def as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat files whose name is "device" as block devices."""
    look = LocalOpener.look

    def taken(self: LocalOpener, path: str) -> Facts:
        return replace(look(self, path), is_device=path.endswith("/device"))

    monkeypatch.setattr(LocalOpener, "look", taken)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Return a real block device of 8 MiB that is full of old data."""
    path = tmp_path / "device"
    path.write_bytes(b"old!" * (2 * MIB))
    with loops.over(path) as device:
        yield Path(device)


def put(image_format: str, tmp_path: Path, target: Path, *, ends: bool = True) -> Image:
    """Put a new image with small clusters and data onto a device, a VHD's footer at its end or where it was."""
    small = {"vhd": 64 << 10, "qcow2": 512, "qcow": 512}[image_format]
    create(image_format, f"{tmp_path}/made", MIB, Wishes(small))
    disk_write(f"{image_format}:{tmp_path}/made", {0: b"a" * 4096, MIB - 512: b"m" * 512})
    data = (tmp_path / "made").read_bytes()
    with target.open("r+b") as file:
        file.write(data)
        if image_format == "vhd" and ends:
            file.seek(-512, os.SEEK_END)
            file.write(data[-512:])
    (tmp_path / "made").unlink()
    return image_of_file(image_format, str(target))


def grow_there(image: Image, size: int) -> None:
    """Grow an image on a device of 8 MiB. Check that it keeps its content and can be written up to its new end."""
    assert MIB == resize(image, size)
    assert check(image).errors == 0
    expected = (b"a" * 4096).ljust(MIB - 512, b"\0") + b"m" * 512 + bytes(1 * MIB)
    assert expected == disk_content(image.text, 2 * MIB)
    if image.format != "qcow":  # the device has no room for another of its tables
        disk_write(image.text, {size - 512: b"n" * 512, MIB: b"o" * 512})
        assert b"o" * 512 == disk_content(image.text, MIB + 512)[-512:]
        qemu.qemu_io(
            Path(image.path), FORMATS[image.format].qemu_name, f"read -P 110 {size - 512} 512", "read -P 97 0 4k"
        )
    assert check(image).errors == 0


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_an_image_on_a_device_grows_where_there_is_room(tmp_path: Path, image_format: str, *, ends: bool) -> None:
    """Longer tables go behind what the image uses, over whatever is there, and a VHD's footer to the device's end."""
    target = tmp_path / "device"
    target.write_bytes(b"old!" * (2 * MIB))
    image = put(image_format, tmp_path, target, ends=ends)
    grow_there(image, 200 * MIB)

    assert 8 * MIB == target.stat().st_size
    if image_format == "vhd":
        assert target.read_bytes()[:512] == target.read_bytes()[-512:]


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_a_real_device(device: Path, tmp_path: Path, image_format: str) -> None:
    """An image on a real block device, a loop device, grows in the same way."""
    grow_there(put(image_format, tmp_path, device), 200 * MIB)


@pytest.mark.usefixtures("as_device")
@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow", "raw"])
def test_a_device_without_room_is_left_alone(tmp_path: Path, image_format: str) -> None:
    """If the tables do not fit, the error says how much space is needed, and nothing is written."""
    target = tmp_path / "device"
    target.write_bytes(b"old!" * (MIB // 2))
    image = image_of_file("raw", str(target)) if image_format == "raw" else put(image_format, tmp_path, target)
    before = target.read_bytes()
    with pytest.raises(DriverError, match=r"the device has 2 MiB, but .* are needed; make the device larger"):
        resize(image, {"vhd": 40 << 30, "qcow2": 9 << 30, "qcow": 1 << 40}.get(image_format, 3 * MIB))

    assert before == target.read_bytes()


@pytest.mark.usefixtures("as_device")
def test_a_block_at_the_end_of_a_device_stays(tmp_path: Path) -> None:
    """If a device has no footer at its end, a block may be there, so no footer is written over it."""
    path = tmp_path / "device"
    path.write_bytes(vhd_image(MIB, {15: dict.fromkeys(range(128), b"b" * 512)}, block_size=64 << 10)[:-512])
    before = path.read_bytes()
    with pytest.raises(DriverError, match="are needed; make"):
        resize(find_image(f"vhd:{path}"), MIB + 512)

    assert before == path.read_bytes()


@pytest.mark.usefixtures("as_device")
def test_a_fixed_vhd_on_a_device(tmp_path: Path) -> None:
    """A fixed VHD grows up to the footer at the device's end, over whatever is there."""
    path = tmp_path / "device"
    create("vhd", str(path), MIB, Wishes(is_fixed=True))
    data = path.read_bytes()
    path.write_bytes(b"a" * MIB + b"old!" * MIB + data[-512:])
    image = find_image(f"vhd:{path}")
    with pytest.raises(DriverError, match="are needed; make"):
        resize(image, 5 * MIB + 512)
    resize(image, 5 * MIB)

    assert b"a" * MIB + bytes(4 * MIB) == disk_content(image.text)


@pytest.mark.parametrize("image_format", ["raw", "vhd", "qcow2", "qcow"])
def test_somebody_elses_resize_is_not_undone(
    tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another program enlarges the disk before we have locked it, the resize is refused: disks never shrink."""
    image = find_image(create(image_format, f"{tmp_path}/image", MIB).text)
    look = module._check_growth

    def look_before_the_other(image: Image, size: int) -> tuple[int, str]:
        found = look(image, size)
        monkeypatch.setattr(module, "_check_growth", look)
        resize(image, 8 * MIB)
        return found

    monkeypatch.setattr(module, "_check_growth", look_before_the_other)
    with pytest.raises(DriverError, match="another program has changed its size"):
        resize(image, 4 * MIB)
    with Session() as session:
        assert 8 * MIB == session.open(image.chain, read_only=True).size
