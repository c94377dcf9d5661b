"""Making images with parents."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image_content import assert_same_for_qemu, disk_content, disk_write
from tests.qemu import qemu_img
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.create import create, snapshot
from xenbackend.image.names import Image, find_image, image_of_file

Make = Callable[[str], Image]
MIB = 1 << 20


@pytest.mark.parametrize("parent_format", ["raw", "vhd", "qcow2", "qcow"])
def test_a_qcow2_child_reads_as_its_parent(made: Make, raw: Path, tmp_path: Path, parent_format: str) -> None:
    """The child stores its parent's format, so QEMU and we open it without being told."""
    parent = image_of_file("raw", str(raw)) if parent_format == "raw" else made(parent_format)
    child = create("qcow2", f"{tmp_path}/child", None, parent=parent)

    assert f"qcow2:{tmp_path}/child" == child.text
    assert raw.read_bytes() == disk_content(child.text)
    assert_same_for_qemu(tmp_path / "child", "qcow2", raw)


@pytest.mark.parametrize("parent_format", ["raw", "vhd"])
def test_a_vhd_child_reads_as_its_parent(made: Make, raw: Path, tmp_path: Path, parent_format: str) -> None:
    """A differencing image finds its parent by name and recognizes it by its UUID."""
    parent = image_of_file("raw", str(raw)) if parent_format == "raw" else made(parent_format)
    child = create("vhd", f"{tmp_path}/child", None, parent=parent)
    disk_write(child.text, {512: b"c" * 512})

    expected = bytearray(raw.read_bytes())
    expected[512:1024] = b"c" * 512
    assert expected == disk_content(child.text)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2"])
def test_a_parent_that_ends_inside_a_sector(tmp_path: Path, image_format: str) -> None:
    """A child of a file that ends inside a sector has whole sectors, with zeros at the end."""
    odd = tmp_path / "odd"
    odd.write_bytes(data := b"p" * (MIB + 1))
    child = create(image_format, f"{tmp_path}/child", None, parent=image_of_file("raw", str(odd)))
    disk_write(child.text, {512: b"c" * 512})

    assert data[:512] + b"c" * 512 + data[1024:].ljust(MIB - 512, b"\0") == disk_content(child.text)
    assert data == odd.read_bytes()


def test_a_parents_names_have_room_behind_a_table(raw: Path, tmp_path: Path) -> None:
    """However long the table, the parent's names are between it and the footer, and direct I/O can reach the end."""
    child = create("vhd", f"{tmp_path}/child", 2816 << 20, parent=image_of_file("raw", str(raw)))

    assert 12288 == (tmp_path / "child").stat().st_size
    assert raw.read_bytes() == disk_content(child.text, raw.stat().st_size)


def test_a_qcow_child_is_told_its_parents_format(made: Make, raw: Path, tmp_path: Path) -> None:
    """QCOW version 1 cannot store the parent's format, so the returned text names it."""
    child = create("qcow", f"{tmp_path}/child", None, parent=image_of_file("raw", str(raw)))

    assert f"qcow:{tmp_path}/child,parent_format=raw" == child.text
    assert raw.read_bytes() == disk_content(child.text)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2"])
def test_a_tree_can_be_moved(made: Make, raw: Path, tmp_path: Path, image_format: str) -> None:
    """A parent is named relative to its child, so the child still finds it after both have moved together."""
    tree = tmp_path / "tree"
    (tree / "base").mkdir(parents=True)
    (tree / "guests").mkdir()
    made(image_format)
    base = (tmp_path / f"disk.{image_format}").rename(tree / "base" / "disk")
    child = create(image_format, f"{tree}/guests/child", None, parent=image_of_file(image_format, str(base)))
    assert f"{image_format}:{tree}/guests/child" == child.text
    moved = tree.rename(tmp_path / "moved")

    assert raw.read_bytes() == disk_content(f"{image_format}:{moved}/guests/child")


def test_children_of_children(made: Make, raw: Path, tmp_path: Path) -> None:
    """A snapshot of a snapshot reads through both, and a child larger than its parent reads zeros beyond it."""
    first = snapshot(made("qcow2"), f"{tmp_path}/one")
    second = snapshot(find_image(first.text), f"{tmp_path}/two")
    larger = create("qcow2", f"{tmp_path}/three", 6 << 20, parent=find_image(second.text))

    assert raw.read_bytes() + bytes(1 << 20) == disk_content(larger.text)
    found = json.loads(qemu_img("info", "--output=json", tmp_path / "two"))
    assert ("one", "qcow2") == (found["backing-filename"], found["backing-filename-format"])


def test_there_are_only_so_many_generations(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that would have too many parents to be opened is not made."""
    monkeypatch.setattr("xenbackend.block.leaf.MAX_PARENTS", 1)
    child = snapshot(made("qcow2"), f"{tmp_path}/one")

    with pytest.raises(ConfigError, match="commit or convert"):
        snapshot(find_image(child.text), f"{tmp_path}/two")


def test_a_parents_own_options_go_on(made: Make, raw: Path, tmp_path: Path) -> None:
    """The options that a parent's layer needs for its own parents are also given to the child's layer."""
    child = create("qcow", f"{tmp_path}/child", None, parent=image_of_file("raw", str(raw)))
    (tmp_path / "sub").mkdir()
    grandchild = create("qcow2", f"{tmp_path}/sub/grandchild", None, parent=find_image(child.text))

    assert f"qcow2:{tmp_path}/sub/grandchild,parent_format=raw" == grandchild.text
    assert raw.read_bytes() == disk_content(grandchild.text)


def test_what_cannot_be_made_is_refused(made: Make, raw: Path, tmp_path: Path) -> None:
    """No size and no parent, a wrong format, a raw child, a missing parent: each is refused and nothing is made."""
    parent, before = made("qcow2"), {path.name for path in tmp_path.iterdir()} | {"disk.qcow2"}
    new = f"{tmp_path}/new"
    with pytest.raises(ConfigError, match="needs a size"):
        create("qcow2", new, None)
    with pytest.raises(ConfigError, match="parent of a vhd image can be vhd or raw, not qcow2"):
        create("vhd", new, None, parent=parent)
    with pytest.raises(ConfigError, match="a raw image cannot have a parent"):
        snapshot(image_of_file("raw", str(raw)), new)
    with pytest.raises(DriverError, match="there is no file"):
        create("qcow2", new, None, parent=find_image("qcow2:/none"))
    assert before == {path.name for path in tmp_path.iterdir()}


NAMES = [b"a:b", b"nbd:x", b"%41", b"a%b", b"b\\c", b"C:", "\xfc \u65e5".encode(), b"x" * 250, b"-", b"a b "]
NO_TEXTS = [b"\xff", b"\xef\xbf\xbd"]  # other names are decoded to the second one


def parent_called(directory: Path, image_format: str, name: bytes) -> Image:
    """Return an image with some data."""
    path = f"{directory}/{os.fsdecode(name)}"
    create(image_format, path, 1 << 20)
    parent = image_of_file(image_format, path)
    disk_write(parent.text, {512: b"p" * 512})
    return parent


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_child_finds_its_parent_by_any_name(tmp_path: Path, image_format: str, name: bytes) -> None:
    """A child can be opened whatever its parent's name."""
    child = snapshot(parent_called(tmp_path, image_format, name), f"{tmp_path}/child")

    assert b"p" * 512 == disk_content(child.text)[512:1024]


@pytest.mark.parametrize("name", NO_TEXTS, ids=repr)
def test_a_name_that_cannot_be_read_back_is_not_written(tmp_path: Path, name: bytes) -> None:
    """VHD cannot store a name that is not Unicode text, so the child is refused with the reason. QCOW2 can store it."""
    parent = parent_called(tmp_path, "vhd", name)
    with pytest.raises(ConfigError, match=r"cannot name its parent .* rename the parent, or make a qcow2 image"):
        snapshot(parent, f"{tmp_path}/child")
    assert [os.fsdecode(name)] == os.listdir(tmp_path)
    child = create("qcow2", f"{tmp_path}/child", None, parent=parent)

    assert b"p" * 512 == disk_content(child.text)[512:1024]
