"""Image commands on QCOW2 images with an external data file, which is locked, grown and checked with the image."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write, ignore
from tests.qcow_images import qcow2, with_word
from tests.qemu import qemu_img, qemu_io
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.check import CLEAN, ERRORS, check, repair
from xenbackend.image.commit import commit
from xenbackend.image.convert import convert
from xenbackend.image.create import snapshot
from xenbackend.image.extents import map_chain
from xenbackend.image.names import Image, find_image, image_of_file
from xenbackend.image.rebase import rebase
from xenbackend.image.resize import resize
from xenbackend.image.session import Session
from xenbackend.worker.image import Image as OpenImage

pytestmark = pytest.mark.usefixtures("parents_anywhere")

MIB = 1 << 20
SIZE = 3 * MIB - 1024
DATA = {0: 4096, MIB: 300 << 10, SIZE - 512: 512}  # where data other than zeros are, and how many bytes


@pytest.fixture(params=["thin", "raw"])
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Image:
    """Return an image of QEMU's with a data file that is thin, or a raw disk."""
    options = f"data_file={tmp_path}/data,data_file_raw={'on' if request.param == 'raw' else 'off'}"
    qemu_img("create", "-f", "qcow2", "-o", options, tmp_path / "a", str(SIZE))
    found, chance = find_image(f"qcow2:{tmp_path}/a,data_file={tmp_path}/data"), Random(1)
    disk_write(found.text, {place: chance.randbytes(length) for place, length in DATA.items()})
    return found


@pytest.mark.slow
def test_the_map_is_qemus(image: Image) -> None:
    """`image map --json` shows places in the data file, as qemu-img does."""
    with Session() as session:
        found = list(map_chain(session.open(image.chain, read_only=True).chain.layers))
    theirs = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", image.path))
    data = [(each.start, each.place) for each in found if each.place is not None]

    assert data == [(each["start"], each["offset"]) for each in theirs if each["data"]]


@pytest.mark.slow
def test_it_is_converted(image: Image, tmp_path: Path) -> None:
    """A converted image needs no data file. A change of the data file counts as a change of the source."""
    target = image_of_file("qcow2", f"{tmp_path}/new")
    before = disk_content(image.text)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(image.chain, target, Wishes(), stop)
    os.utime(tmp_path / "data", ns=(1, 1))
    with pytest.raises(ConfigError, match="the source has changed"):
        convert(image.chain, target, Wishes(), ignore, resume=True)
    for left in tmp_path.glob("new.partial*"):
        left.unlink()
    convert(image.chain, target, Wishes(), ignore)

    (tmp_path / "data").unlink()
    assert before == disk_content(target.text)
    with pytest.raises(ConfigError, match="a new image holds its data itself"):
        convert(target.chain, image_of_file("qcow2", f"{tmp_path}/other", f"data_file={tmp_path}/x"), Wishes(), ignore)
    assert [] == list(tmp_path.glob("other*"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "extra"), [(3 * MIB, 0), (40 * MIB, 2 * MIB)])
def test_what_is_new_is_zeros(image: Image, tmp_path: Path, size: int, extra: int) -> None:
    """The data file grows with the disk. What it had beyond the disk's end becomes zeros, even if it is a raw disk."""
    expected = disk_content(image.text).ljust(size, b"\0")
    with (tmp_path / "data").open("r+b") as file:
        file.truncate(SIZE)
        file.seek(SIZE)
        file.write(b"s" * extra)

    assert SIZE == resize(image, size)
    assert expected == disk_content(image.text)
    (tmp_path / "plain").write_bytes(expected)
    assert_same_for_qemu(Path(image.path), "qcow2", tmp_path / "plain")
    assert (CLEAN, (0, 0)) == (check(image).status, qemu.check(Path(image.path)))
    is_raw = json.loads(qemu_img("info", "--output=json", image.path))["format-specific"]["data"]["data-file-raw"]
    assert not is_raw or expected == (tmp_path / "data").read_bytes()[:size]
    disk_write(image.text, {size - 512: b"n" * 512})
    qemu_io(Path(image.path), "qcow2", f"read -P 110 {size - 512} 512")


@pytest.mark.slow
def test_a_device_that_is_too_small(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the data file cannot grow, the error names it, and the disk keeps its size."""

    def grow(self: OpenImage, size: int, _tail: bytes = b"") -> None:
        if size > self.size:
            raise OSError(errno.ENOSPC, "a block device cannot grow")

    monkeypatch.setattr(OpenImage, "grow", grow)
    with pytest.raises(DriverError, match=rf"data file {tmp_path}/data has .*; make it larger first"):
        resize(image, 40 * MIB)
    monkeypatch.undo()

    assert SIZE == len(disk_content(image.text))


@pytest.mark.slow
def test_a_snapshot_and_back(image: Image, tmp_path: Path) -> None:
    """A child stores its data in itself. Its parent does not change until the child is committed to it."""
    first = disk_content(image.text)
    child = find_image(snapshot(image, f"{tmp_path}/child").text)
    disk_write(child.text, {512: b"c" * 512, 2 * MIB: b"d" * 4096})
    assert first == disk_content(image.text)
    expected = bytearray(first)
    expected[512:1024], expected[2 * MIB : 2 * MIB + 4096] = b"c" * 512, b"d" * 4096
    assert expected == disk_content(child.text)
    with pytest.raises(ConfigError, match=rf"is not enough for writing; .* add --into {image.text}$"):
        commit(child, ignore)
    assert first == disk_content(image.text)
    commit(child, ignore, into=image)

    assert expected == disk_content(image.text)
    assert (0, 0) == qemu.check(Path(image.path))


@pytest.mark.slow
def test_another_parent(image: Image, tmp_path: Path) -> None:
    """An image can get a parent and lose it again. If its data file is a raw disk, it cannot have one, as in QEMU."""
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    base, before = image_of_file("raw", f"{tmp_path}/base"), disk_content(image.text)
    is_raw = Path(image.path).read_bytes()[95] == 2
    if is_raw:
        with pytest.raises(ConfigError, match="its external data file is a raw disk by itself, which has no parent"):
            rebase(image, base, ignore)
    else:
        assert f"qcow2:{image.path},data_file={tmp_path}/data" == rebase(image, base, ignore).text
        assert before == disk_content(image.text)
    rebase(image, None, ignore)

    assert before == disk_content(image.text)
    assert is_raw == (Path(image.path).read_bytes()[95] == 2)
    assert (0, 0) == qemu.check(Path(image.path))


@pytest.mark.usefixtures("no_wait_for_locks")
def test_a_data_file_in_use(tmp_path: Path) -> None:
    """While the data file is used as a disk of its own, the image is refused, and the error names the data file."""
    for name, backing in (("base", b""), ("child", b"base")):
        (tmp_path / f"{name}.data").write_bytes(bytes(MIB))
        options = {"backing": backing, "backing_format": b"qcow2"} if backing else {}
        (tmp_path / name).write_bytes(qcow2(MIB, data_name=f"{name}.data".encode(), **options))
    child, base = (
        find_image(f"qcow2:{tmp_path}/{name},data_file={tmp_path}/{name}.data") for name in ("child", "base")
    )
    for used in ("child.data", "base.data"):
        with Session() as session:
            session.open(parse_chain(f"aio:{tmp_path / used}"), read_only=False)
            with pytest.raises(DriverError, match=f"{used} is locked by another process"):
                commit(child, ignore, into=base)
            image = base if used == "base.data" else child
            assert any(f"{used} is locked" in each for each in check(image).sentences)
            with pytest.raises(DriverError, match=f"{used} is locked by another process"):
                resize(image, 2 * MIB)


def test_a_child_cannot_say_where_its_parents_data_are(tmp_path: Path) -> None:
    """If only `data_file=` in the layer leads to the data, the image can have no child unless it names it too."""
    (tmp_path / "data").write_bytes(bytes(MIB))
    (tmp_path / "a").write_bytes(qcow2(MIB, data_name=b"gone"))
    with pytest.raises(ConfigError, match="qemu-img amend -f qcow2 -o data_file=FILE"):
        snapshot(find_image(f"qcow2:{tmp_path}/a,data_file={tmp_path}/data"), f"{tmp_path}/child")
    assert not (tmp_path / "child").exists()
    (tmp_path / "a").write_bytes(qcow2(MIB, data_name=b"data"))

    made = snapshot(find_image(f"qcow2:{tmp_path}/a,data_file={tmp_path}/data"), f"{tmp_path}/child")
    assert bytes(MIB) == disk_content(made.text)


def test_a_child_elsewhere(tmp_path: Path) -> None:
    """A child in another directory allows the directory that holds its parent and the parent's data file."""
    for directory in ("data", "base", "child"):
        (tmp_path / directory).mkdir()
    (tmp_path / "data" / "d").write_bytes(b"d" * MIB)
    (tmp_path / "base" / "b").write_bytes(qcow2(MIB, {0: b""}, data_name=b"../data/d"))
    made = snapshot(find_image(f"qcow2:{tmp_path}/base/b,parents={tmp_path}"), f"{tmp_path}/child/c")

    assert f"qcow2:{tmp_path}/child/c,parents={tmp_path}" == made.text
    assert b"d" * 4096 == disk_content(made.text)[:4096]


@pytest.mark.parametrize(
    ("length", "sentence"),
    [(None, "its data file is not there"), (MIB // 2, "has 512 KiB, and its disk 1 MiB"), (0, "is empty")],
)
def test_what_cannot_be_opened_is_not_sound(tmp_path: Path, length: int | None, sentence: str) -> None:
    """A data file that is missing, or cannot hold the disk, is an error that a repair does not fix."""
    image = find_image(f"qcow2:{tmp_path}/a")
    named = find_image(f"{image.text},data_file={tmp_path}/data")
    (tmp_path / "a").write_bytes(qcow2(MIB, {0: b""}, data_name=b"data"))
    if length is not None:
        (tmp_path / "data").write_bytes(bytes(length))
    found = check(image)
    assert (ERRORS, 1) == (found.status, found.errors)
    assert sentence in found.sentences[0]

    found = repair(named)
    assert (ERRORS, 1) == (found.status, found.errors)


def test_a_cluster_at_another_place(tmp_path: Path) -> None:
    """A cluster that is not at its disk's offset in the data file is an error, which names both offsets."""
    (tmp_path / "data").write_bytes(bytes(MIB))
    data = qcow2(MIB, {0: b""}, data_name=b"data")
    (tmp_path / "a").write_bytes(with_word(data, 2, lambda _word: 4096 | 1 << 63, 3))
    found = check(find_image(f"qcow2:{tmp_path}/a"))

    assert (ERRORS, ("the cluster at byte 12288 of the disk is at byte 4096 of the data file",)) == (
        found.status,
        found.sentences,
    )


def neighbours(directory: Path) -> tuple[Path, Path]:
    """Return an image that names somebody else's raw disk as its data file, and that disk, whose name needs escapes."""
    victim, path = directory / "a, b|c", directory / "image"
    victim.write_bytes(b"v" * MIB)
    path.write_bytes(qcow2(MIB, {0: b""}, data_name=victim.name.encode(), autoclear=1, backing=b"base"))
    (directory / "base").write_bytes(bytes(MIB))
    return path, victim


@pytest.mark.parametrize("attempt", ["open", "resize", "repair", "rebase", "rebase --unsafe"])
def test_a_neighbours_disk_is_not_written(tmp_path: Path, attempt: str) -> None:
    """Writing is refused if only the image names its data file. The error says what to add, and with that it works."""
    path, victim = neighbours(tmp_path)
    bare = f"qcow2:{path},parent_format=raw"
    before, lengths = path.read_bytes(), (path.stat().st_size, victim.stat().st_size)

    def attempt_it(image: Image) -> None:
        if attempt == "open":
            disk_write(image.text, {0: b"w" * 512})
        elif attempt == "resize":
            resize(image, 2 * MIB)
        elif attempt == "repair":
            repair(image)
        else:
            assert ",data_file=" in rebase(image, None, ignore, is_unsafe=attempt != "rebase").text

    with pytest.raises(DriverError, match="is named only by the image, which is not enough for writing") as caught:
        attempt_it(find_image(bare))
    assert bare == caught.value.layer
    assert b"v" * MIB == victim.read_bytes()
    if attempt == "open":  # opening the image itself has extended it to the end of a sector
        assert before == path.read_bytes()[: len(before)]
    else:
        assert (before, lengths) == (path.read_bytes(), (path.stat().st_size, victim.stat().st_size))
    said = caught.value.problem.partition("; if that file belongs to it, add ")[2]
    assert rf"data_file={tmp_path}/a\, b\|c" == said

    attempt_it(find_image(f"{bare},{said}"))


def test_a_neighbours_disk_is_not_committed_to(tmp_path: Path) -> None:
    """A parent's data file is written only if `into` names the parent with exactly that file."""
    path, victim = neighbours(tmp_path)
    parents = find_image(f"qcow2:{path},parent_format=raw")
    child = find_image(snapshot(parents, f"{tmp_path}/child").text)
    disk_write(child.text, {0: b"c" * 512})
    before = path.read_bytes()
    other = tmp_path / "other"
    other.write_bytes(b"o" * MIB)
    escaped = rf"{parents.text},data_file={tmp_path}/a\, b\|c"
    with pytest.raises(ConfigError, match="is not enough for writing") as caught:
        commit(child, ignore)
    assert escaped == str(caught.value).partition(" --into ")[2]
    wrong = [parents.text, f"aio:{path}", f"aio:{tmp_path}/base", f"{parents.text},data_file={tmp_path}/other",
             f"{parents.text},data_file={tmp_path}/gone", child.text]  # fmt: skip
    for text in wrong:
        with pytest.raises(ConfigError, match="is not its parent, or lacks the parent's data file"):
            commit(child, ignore, into=find_image(text))
    assert (before, b"v" * MIB, b"o" * MIB) == (path.read_bytes(), victim.read_bytes(), other.read_bytes())
    commit(child, ignore, into=find_image(escaped))

    assert b"c" * 512 + b"v" * 3584 == victim.read_bytes()[:4096]
