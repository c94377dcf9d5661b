"""Giving an image another parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write, ignore
from tests.qemu import qemu_img, qemu_io
from xenbackend.block.formats.blank import Wishes
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.check import check
from xenbackend.image.create import create
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.rebase import Rebased, rebase
from xenbackend.image.session import Session

pytestmark = pytest.mark.usefixtures("parents_anywhere")

MIB = 1 << 20
FORMATS = ["vhd", "qcow2"]
Family = Callable[[str], tuple[Image, Image, Image]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Return a function that makes a child, its parent, and another image that could be its parent."""

    def make(image_format: str) -> tuple[Image, Image, Image]:
        parents = []
        for number, size in ((1, 3 * MIB), (2, 2 * MIB)):
            parent = create(image_format, f"{tmp_path}/parent{number}", size)
            chance = Random(number)
            same = {MIB: b"s" * 8192}
            disk_write(parent.text, same | {chance.randrange(4000) * 512: chance.randbytes(1536) for _ in range(20)})
            parents.append(find_image(parent.text))
        child = create(image_format, f"{tmp_path}/child", 4 * MIB, parent=parents[0])
        chance = Random(3)
        disk_write(child.text, {chance.randrange(8000) * 512: chance.randbytes(1024) for _ in range(10)})
        return find_image(child.text), *parents

    return make


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("to", ["other", "raw", "none", "same"])
def test_the_disk_reads_as_before(family: Family, raw: Path, tmp_path: Path, image_format: str, to: str) -> None:
    """The disk reads as before, for QEMU too, with any new parent, even a smaller one. The image stays sound."""
    child, parent, other = family(image_format)
    new = {"other": other, "raw": image_of_file("raw", str(raw)), "none": None, "same": parent}[to]
    before = disk_content(child.text)
    untouched = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "child"}
    done = rebase(child, new, ignore)

    assert before == disk_content(done.text)
    assert (0, 0) == (check(child).errors, check(child).leaks)
    assert (done.written == 0) == (to == "same")
    assert done.parent == (new.text if new else "")
    assert untouched == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "child"}
    if image_format == "qcow2":
        (tmp_path / "expected").write_bytes(before)
        assert_same_for_qemu(tmp_path / "child", "qcow2", tmp_path / "expected")
        assert (0, 0) == qemu.check(tmp_path / "child")
        found = json.loads(qemu_img("info", "--output=json", tmp_path / "child"))
        assert (Path(new.path).name if new else None) == found.get("backing-filename")
    elif new is None:
        (tmp_path / "expected").write_bytes(before)
        assert_same_for_qemu(tmp_path / "child", "vhd", tmp_path / "expected")


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_parent_is_taken_out_of_the_middle(family: Family, tmp_path: Path, image_format: str) -> None:
    """An image can be rebased to its grandparent, and one without a parent can get one."""
    child, parent, other = family(image_format)
    leaf = create(image_format, f"{tmp_path}/leaf", None, parent=child)
    disk_write(leaf.text, {2 * MIB: b"l" * 4096})
    before = disk_content(leaf.text)
    done = rebase(find_image(leaf.text), parent, ignore)
    Path(child.path).unlink()
    assert before == disk_content(done.text)

    alone = disk_content(parent.text)
    done = rebase(parent, other, ignore)
    assert alone == disk_content(done.text)


@pytest.mark.parametrize("image_format", FORMATS)
def test_unsafe_changes_the_name_only(family: Family, tmp_path: Path, image_format: str) -> None:
    """With `--unsafe` only the header is changed, and the former parent need not exist, as after it was moved."""
    child, parent, other = family(image_format)
    before = disk_content(child.text)
    moved = image_of_file(image_format, f"{tmp_path}/moved")
    Path(parent.path).rename(moved.path)
    with pytest.raises(DriverError, match="parent is not there"):
        rebase(child, moved, ignore)
    assert 0 == rebase(child, moved, ignore, is_unsafe=True).written
    assert before == disk_content(child.text)

    rebase(child, other, ignore, is_unsafe=True)
    assert before != disk_content(child.text)


@pytest.mark.parametrize("image_format", FORMATS)
def test_stopped_anywhere_the_disk_reads_as_before(family: Family, image_format: str) -> None:
    """A rebase that is stopped leaves the former parent until all data are written, and the next one completes it."""
    child, _, other = family(image_format)
    before = disk_content(child.text)
    left = 2

    def stop(_done: int, _total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebase(child, other, stop)
    assert before == disk_content(child.text)
    rebase(child, other, ignore)
    assert before == disk_content(child.text)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_header_is_changed_in_steps(
    family: Family, tmp_path: Path, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two durable steps of a change of the header, the image opens and reads as before."""
    child, _, other = family(image_format)
    before = disk_content(child.text)
    kept: list[bytes] = []
    from xenbackend.image import writing

    steps = writing.write_plan

    def watched(file: object, plan: list[list[tuple[int, bytes]]]) -> None:
        for writes in plan:
            steps(file, [writes])
            kept.append(Path(child.path).read_bytes())

    monkeypatch.setattr(writing, "write_plan", watched)
    rebase(child, other, ignore)
    for number, content in enumerate(kept):
        copy = image_of_file(image_format, f"{tmp_path}/copy{number}")
        Path(copy.path).write_bytes(content)
        assert before == disk_content(copy.text)
    assert len(kept) >= 2


def test_names_of_any_length_take_turns(tmp_path: Path) -> None:
    """In QCOW2 headers of small and large clusters, names of any length replace each other, and the rest is kept."""
    for cluster in (512, 65536):
        directory = tmp_path / str(cluster)
        directory.mkdir()
        parents = [create("qcow2", f"{directory}/{'p' * length}", MIB) for length in (1, 100, 30, 200)]
        child = directory / "child"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat=v3", child, "1M")
        qemu_io(child, "qcow2", "write -P 5 0 64k")
        image = image_of_file("qcow2", str(child))
        before = disk_content(image.text)
        for parent in [*parents, parents[0]]:
            try:
                rebase(image, find_image(parent.text), ignore)
            except ConfigError as error:
                assert cluster == 512
                assert "too many for the image's header" in str(error)  # noqa: PT017 - other errors are right, too
            assert before == disk_content(image.text)
        rebase(image, None, ignore)
        assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", child))
        assert (0, 0) == qemu.check(child)
        assert before == disk_content(image.text)


def test_what_cannot_be_is_refused(family: Family, raw: Path, tmp_path: Path) -> None:
    """Itself, its own child, a format without parents, a fixed VHD, snapshots: each is refused, nothing is written."""
    child, parent, _ = family("qcow2")
    fixed = create("vhd", f"{tmp_path}/fixed", MIB, Wishes(is_fixed=True))
    shot = tmp_path / "shot"
    qemu_img("create", "-q", "-f", "qcow2", shot, "1M")
    qemu_img("snapshot", "-c", "s", shot)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for image, new, problem in (
        (parent, child, "itself, or one of its children"),
        (parent, parent, "itself, or one of its children"),
        (image_of_file("raw", str(raw)), parent, "only vhd and qcow2"),
        (find_image(fixed.text), image_of_file("raw", str(raw)), "is fixed: it holds"),
        (image_of_file("vhd", child.path), parent, "parent of a vhd image can be"),
        (image_of_file("qcow2", str(shot)), parent, "internal snapshots"),
    ):
        with pytest.raises((ConfigError, DriverError), match=problem):
            rebase(image, new, ignore)

    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.usefixtures("no_wait_for_locks")
def test_images_in_use_are_refused(family: Family) -> None:
    """A child that is being read is not changed, with or without `--unsafe`."""
    child, _, other = family("qcow2")
    with Session() as session:
        session.open(child.chain, read_only=True)
        for is_unsafe in (False, True):
            with pytest.raises(DriverError, match="locked by another process"):
                rebase(child, other, ignore, is_unsafe=is_unsafe)


def test_what_is_told_can_be_used(family: Family, tmp_path: Path) -> None:
    """The returned layer opens the image with a parent in another directory."""
    child, _, other = family("qcow2")
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "other"
    Path(other.path).rename(far)
    directory = tmp_path / "near"
    directory.mkdir()
    before = disk_content(child.text)
    rebase(child, None, ignore)
    near = directory / "child"
    Path(child.path).rename(near)

    done = rebase(image_of_file("qcow2", str(near)), image_of_file("qcow2", str(far)), ignore)

    assert isinstance(done, Rebased)
    assert f"qcow2:{near}" == done.text
    assert before == disk_content(done.text)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("how", ["exchanged", "removed", "grandparent"])
def test_a_parent_that_is_exchanged_is_not_named(family: Family, tmp_path: Path, image_format: str, how: str) -> None:
    """If the new parent or its own parent was replaced or removed during the rebase, the former parent is kept."""
    child, parent, other = family(image_format)
    before = disk_content(child.text)
    middle = find_image(create(image_format, f"{tmp_path}/middle", None, parent=other).text)
    path = Path((other if how == "grandparent" else middle).path)
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())

    def exchange(done: int, total: int) -> None:
        if done == total:
            path.unlink()
            if how != "removed":
                copy.rename(path)

    with pytest.raises(DriverError, match=f"{image_format}:{child.path}: .*replaced or moved meanwhile"):
        rebase(child, middle, exchange)
    assert before == disk_content(child.text)
    Path(parent.path).unlink()
    with pytest.raises(DriverError, match="parent is not there"):
        disk_content(child.text)
