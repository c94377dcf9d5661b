"""Trusting an image, and what the commands that give an image a parent leave behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign_images import descriptor
from tests.image_content import disk_content, disk_write
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from xenbackend.block.formats.blank import Parent
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.create import create, snapshot
from xenbackend.image.facts import chain_facts
from xenbackend.image.formats.qcow2 import Qcow2
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.rebase import rebase
from xenbackend.image.trust import Trusted, trust
from xenbackend.opener import marks

Make = Callable[[str], Image]
MIB = 1 << 20


def chain_of_three(directory: Path) -> Image:
    """Make an image with two parents and without marks, as an older release or QEMU makes it."""
    (directory / "base").write_bytes(b"b" * MIB)
    for name, parent, kind in (("mid", "base", "raw"), ("top", "mid", "qcow2")):
        qemu_img("create", "-q", "-f", "qcow2", "-b", parent, "-F", kind, directory / name)
    return find_image(f"qcow2:{directory}/top")


def ignore(_done: int, _total: int) -> None:
    """Ignore the progress."""


def test_a_chain_of_three_is_trusted(tmp_path: Path) -> None:
    """Images of an older release are refused until they are trusted. Each one is then marked with its own parent."""
    top = chain_of_three(tmp_path)
    with pytest.raises(DriverError, match=r"mid is named only by the image; .* xenbackend image trust LAYER"):
        disk_content(top.text)
    assert [
        Trusted(f"{tmp_path}/top", "parent", f"{tmp_path}/mid", "image trust"),
        Trusted(f"{tmp_path}/mid", "parent", f"{tmp_path}/base", "image trust"),
    ] == trust(top)

    assert b"b" * MIB == disk_content(top.text)
    assert ["its mark", "its mark"] == [each.before for each in trust(top)]
    assert ["its mark", "its mark", ""] == [each.parent_by for each in chain_facts(top.chain).layers]


def test_nothing_is_marked_where_a_parent_cannot_be_opened(tmp_path: Path) -> None:
    """If a parent is missing, or is not a file, no image of the chain is marked."""
    top = chain_of_three(tmp_path)
    (tmp_path / "base").unlink()
    with pytest.raises(DriverError, match="its parent is not there: the image names 'base'"):
        trust(top)
    (tmp_path / "base").symlink_to("/dev/null")
    with pytest.raises(DriverError, match="base is /dev/null, and is not a file or block device"):
        trust(top)
    for name in ("top", "mid"):
        assert [] == os.listxattr(tmp_path / name)


def test_images_that_cannot_be_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system cannot keep marks, the error says what to do, and the layer of a new child has `parents=`."""
    top = chain_of_three(tmp_path)
    monkeypatch.setattr(marks, "obstacle", lambda _fd: "its file system cannot keep marks (trusted.* attributes)")
    with pytest.raises(DriverError, match=r"top: its file system cannot keep marks .*: parents=DIRECTORY"):
        trust(top)
    monkeypatch.setattr(marks, "PARENT", "nonsense.xenbackend.parent")
    made = snapshot(find_image(f"{top.text},parents={tmp_path}"), f"{tmp_path}/new")

    assert f"qcow2:{tmp_path}/new,parents={tmp_path}" == made.text
    assert b"b" * MIB == disk_content(made.text)
    with pytest.raises(DriverError, match="named only by the image, and its file system cannot keep marks"):
        disk_content(f"qcow2:{tmp_path}/new")


def test_data_in_other_files_are_trusted(tmp_path: Path) -> None:
    """The data file of a QCOW2 image and the extents of a VMDK image have to be trusted too."""
    (tmp_path / "data").write_bytes(b"d" * MIB)
    (tmp_path / "a").write_bytes(qcow2(MIB, {0: b""}, data_name=b"data"))
    (tmp_path / "flat").write_bytes(b"f" * MIB)
    lines = "\n".join(f'RW 1024 FLAT "flat" {place}' for place in (0, 1024))
    (tmp_path / "v").write_bytes(descriptor(lines))
    for text, what, name in ((f"qcow2:{tmp_path}/a", "data file", "data"), (f"vmdk:{tmp_path}/v", "extent", "flat")):
        with pytest.raises(DriverError, match=f"its {what} .* is named only by the image"):
            disk_content(text)
        found = trust(find_image(text, ("qcow2", "vmdk")))
        assert {(what, f"{tmp_path}/{name}")} == {(each.what, each.file) for each in found}
        assert name.encode()[:1] * 512 == disk_content(text)[:512]
    with pytest.raises(DriverError, match="is not enough for writing"):
        disk_write(f"qcow2:{tmp_path}/a", {0: b"x" * 512})


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_what_is_made_is_opened_without_an_option(made: Make, raw: Path, tmp_path: Path, image_format: str) -> None:
    """A snapshot and a rebased image open with parents anywhere, but not with another file in a parent's place."""
    parent = made(image_format)
    (tmp_path / "far").mkdir()
    child = find_image(snapshot(parent, f"{tmp_path}/far/child").text)
    other = create(image_format, f"{tmp_path}/other", None, parent=parent)
    more = ",parent_format=qcow" * (image_format == "qcow")
    assert (f"{image_format}:{tmp_path}/far/child{more}", raw.read_bytes()) == (child.text, disk_content(child.text))
    Path(parent.path).rename(tmp_path / "kept")
    shutil.copyfile(tmp_path / "kept", parent.path)
    with pytest.raises(DriverError, match="is not the one that the image was marked for"):
        disk_content(child.text)
    (tmp_path / "kept").rename(parent.path)
    if image_format != "qcow":
        done = rebase(child, find_image(other.text), ignore)
        assert (f"{image_format}:{tmp_path}/far/child", raw.read_bytes()) == (done.text, disk_content(done.text))
        rebase(child, None, ignore)
        assert [] == os.listxattr(child.path)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rebase_that_is_killed_leaves_an_image_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """If a rebase is killed while the image gets its parent's name, it opens with one parent or the other."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"b" * MIB)
    child = find_image(create("qcow2", f"{tmp_path}/child", None, parent=image_of_file("raw", f"{tmp_path}/one")).text)
    name_parent = Qcow2.name_parent

    def die(self: Qcow2, file: object, parent: Parent | None) -> None:
        if when == "after":
            name_parent(self, file, parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(Qcow2, "name_parent", die)
    with pytest.raises(KeyboardInterrupt):
        rebase(child, image_of_file("raw", f"{tmp_path}/two"), ignore)
    monkeypatch.undo()
    (parent,) = [each.parent for each in chain_facts(child.chain).layers if each.parent]

    assert f"aio:{tmp_path}/{'one' if when == 'before' else 'two'}" == parent
    assert b"b" * MIB == disk_content(child.text)
    assert f"qcow2:{tmp_path}/child" == rebase(child, image_of_file("raw", f"{tmp_path}/two"), ignore).text


def test_the_disk_of_a_neighbour(tmp_path: Path) -> None:
    """R18: a tenant's image that names a neighbour's disk does not read it, and does not lock it against its owner."""
    (tmp_path / "victim").write_bytes(b"SECRET".ljust(MIB, b"!"))
    for text, data in (
        ("qcow2:{}/evil", qcow2(MIB, backing=b"victim", backing_format=b"raw")),
        ("qcow2:{}/evil", qcow2(MIB, {0: b""}, data_name=b"victim")),
        ("vmdk:{}/evil", descriptor('RW 2048 FLAT "victim" 0')),
    ):
        (tmp_path / "evil").write_bytes(data)
        with pytest.raises(DriverError, match="victim is named only by the image"):
            disk_content(text.format(tmp_path))
        disk_write(f"aio:{tmp_path}/victim", {512: b"w" * 512})


def test_a_copy_of_a_child_has_to_be_trusted(made: Make, tmp_path: Path) -> None:
    """A copy of an image without its attributes, as cp makes it, has to be trusted again."""
    child = snapshot(made("qcow2"), f"{tmp_path}/child")
    shutil.copyfile(tmp_path / "child", tmp_path / "copy")
    with pytest.raises(DriverError, match=r"named only by the image; .* xenbackend image trust LAYER"):
        disk_content(f"qcow2:{tmp_path}/copy")
    trust(find_image(f"qcow2:{tmp_path}/copy"))

    assert disk_content(child.text) == disk_content(f"qcow2:{tmp_path}/copy")


@pytest.mark.slow
def test_a_long_chain(tmp_path: Path) -> None:
    """In a chain with 32 parents, each one is allowed by the mark of its own child."""
    (tmp_path / "0").write_bytes(b"b" * MIB)
    create("qcow2", f"{tmp_path}/1", None, parent=image_of_file("raw", f"{tmp_path}/0"))
    for number in range(2, 33):
        snapshot(image_of_file("qcow2", f"{tmp_path}/{number - 1}"), f"{tmp_path}/{number}")

    assert b"b" * MIB == disk_content(f"qcow2:{tmp_path}/32")
    os.removexattr(tmp_path / "7", marks.PARENT)
    with pytest.raises(DriverError, match=rf"qcow2:{tmp_path}/7: its parent {tmp_path}/6 is named only by the image"):
        disk_content(f"qcow2:{tmp_path}/32")
    assert 1 == [each.before for each in trust(find_image(f"qcow2:{tmp_path}/32"))].count("image trust")
    assert 33 == len(chain_facts(parse_chain(f"qcow2:{tmp_path}/32")).layers)
