"""Images with subclusters: what each bitmap means, which ones are invalid, and that everything reads as in QEMU."""

from __future__ import annotations

import errno
import json
from array import array
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.helpers_block import Machine, content, flush, read, write
from tests.image_content import disk_content, ignore
from tests.qcow_images import COMPRESSED, COPIED, qcow2, with_word
from xenbackend.block.extents import Kind
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.formats.qcow2 import parse_header
from xenbackend.block.formats.qcow2_check import check
from xenbackend.block.mapped.tables import READABLE, SPECIAL, ZERO
from xenbackend.block.qcow.subclusters import entries_of
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.convert import convert
from xenbackend.image.create import create
from xenbackend.image.extents import map_chain
from xenbackend.image.names import find_image, image_of_file
from xenbackend.image.resize import resize
from xenbackend.image.session import Session

pytestmark = pytest.mark.usefixtures("parents_anywhere")

SIZE = 1 << 20
BITS, CLUSTER, PART = 14, 16384, 512
PLACE = 5 * CLUSTER
ALL = (1 << 32) - 1
IMAGE = qcow2(SIZE, cluster_bits=BITS, bitmaps={})
APART = qcow2(SIZE, cluster_bits=BITS, bitmaps={}, data_name=b"data")
HEADER, HEADER_APART = (
    parse_header(lambda offset, length, data=data: data[offset : offset + length], len(data)) for data in (IMAGE, APART)
)


def entries(word: int, bitmap: int) -> list[int]:
    """Return the entries of one cluster."""
    return list(entries_of(array("Q", [word, bitmap]), HEADER, 0))


def test_whole_clusters() -> None:
    """A cluster may be all data, all zeros, all its parent's, or compressed. Reserved bits are ignored."""
    data = [PLACE + part * PART | READABLE for part in range(32)]

    assert data == entries(PLACE | COPIED, ALL) == entries(PLACE, ALL) == entries(PLACE | 1 | 1 << 60, ALL)
    assert [ZERO] * 32 == entries(0, ALL << 32)
    assert [PLACE + part * PART | ZERO for part in range(32)] == entries(PLACE | COPIED, ALL << 32)
    assert [0] * 32 == entries(0, 0) == entries(PLACE | COPIED, 0) == entries(1, 0)
    assert [SPECIAL] * 32 == entries(COMPRESSED | PLACE, 0) == entries(COMPRESSED | PLACE, 5)


def test_parts_of_clusters() -> None:
    """Each bit stands for one subcluster, the least significant one for the first."""
    found = entries(PLACE | COPIED, 1 | 1 << 31 | 1 << 33)

    assert [PLACE | READABLE, PLACE + PART | ZERO, 0] == found[:3]
    assert [0] * 28 == found[3:31]
    assert PLACE + 31 * PART | READABLE == found[31]


@pytest.mark.parametrize(
    ("word", "bitmap"),
    [(PLACE, 1 | 1 << 32), (PLACE, ALL << 32 | ALL), (0, 1), (COPIED, 1 << 31), (PLACE + 512, ALL), (PLACE + 512, 0)],
)
def test_what_contradicts_itself(word: int, bitmap: int) -> None:
    """If a word and its bitmap contradict each other, that cluster cannot be read. All others can."""
    found = list(entries_of(array("Q", [PLACE, ALL, word, bitmap, 0, 0]), HEADER, 0))

    assert [SPECIAL] * 32 == found[32:64]
    assert (PLACE | READABLE, 0) == (found[0], found[64])


def test_places_in_a_data_file() -> None:
    """In an external data file each cluster must be at its disk's offset, even the first one."""
    words = array("Q", [COPIED, 1, CLUSTER | COPIED, 1, PLACE | COPIED, 1, 0, 1])

    assert [READABLE, CLUSTER | READABLE, SPECIAL, SPECIAL] == list(entries_of(words, HEADER_APART, 0))[::32]


@pytest.mark.parametrize(
    ("index", "word", "bitmap"),
    [(0, -1, ALL << 32 | 1), (2, 0, 1), (2, COPIED, 1), (0, 512, ALL), (4, -1, 1), (2, 1, ALL << 32), (2, 1 << 60, 0)],
)
def test_hostile_entries(machine: Machine, tmp_path: Path, index: int, word: int, bitmap: int) -> None:
    """We read the entries that QEMU reads, return EIO for exactly those that are EIO in QEMU, and both checks agree."""
    path = tmp_path / "a"
    data = qcow2(
        SIZE, {0: b"a" * CLUSTER}, cluster_bits=BITS, compressed={2: b"c" * CLUSTER}, bitmaps={0: ALL}, table_clusters=1
    )
    data = with_word(data, 2, lambda was: was if word < 0 else was + word if word == 512 else word, index)
    path.write_bytes(with_word(data, 2, lambda _was: bitmap, index + 1))
    chain = machine.open(f"qcow2:{path}", read_only=True)
    requests = [read(cluster * CLUSTER + 1024, 512) for cluster in range(4)]
    found = machine.do(chain, *requests)
    chain.close()
    for status, request in zip(found, requests, strict=True):
        part = {"driver": "raw", "offset": request.offset, "size": 512, "file": {"driver": "qcow2", "file": {
            "driver": "file", "filename": str(path)}}}  # fmt: skip
        raw = tmp_path / f"{request.offset}"
        if status:
            with pytest.raises(AssertionError, match="Input/output error"):
                qemu.qemu_img("convert", "-O", "raw", f"json:{json.dumps(part)}", raw)
        else:
            qemu.qemu_img("convert", "-O", "raw", f"json:{json.dumps(part)}", raw)
            assert raw.read_bytes() == content(request)
        assert status in (0, errno.EIO)
    report = check(lambda offset, length: path.read_bytes()[offset : offset + length], path.stat().st_size)
    assert (report.errors > 0) == (qemu.check(path)[0] > 0)


def test_it_is_only_read(machine: Machine, tmp_path: Path) -> None:
    """Opening for writing is refused before anything is changed, with what to do. A child can be written."""
    path = tmp_path / "a"
    path.write_bytes(qcow2(SIZE, {0: b"a" * CLUSTER}, cluster_bits=BITS, bitmaps={0: 3}, autoclear=1))
    before = path.read_bytes()
    with pytest.raises(DriverError, match=r"it has subclusters .*; xenbackend image convert makes an image without"):
        machine.open(f"qcow2:{path}")
    child = create("qcow2", f"{tmp_path}/child", None, parent=find_image(f"qcow2:{path}"))
    chain = machine.open(child.text)
    request = read(0, 2048)
    assert [0, 0] == machine.do(chain, write(512, b"w" * 512), flush())
    assert [0] == machine.do(chain, request)
    chain.close()

    assert b"a" * 512 + b"w" * 512 + bytes(1024) == content(request)
    assert before == path.read_bytes()[: len(before)]


def test_a_disk_that_ends_inside_a_cluster(tmp_path: Path) -> None:
    """The last cluster is read up to the disk's end, and from the parent where the image has nothing."""
    size = SIZE - 3 * PART
    (tmp_path / "base").write_bytes(b"p" * size)
    data = qcow2(size, {63: b"x" * CLUSTER}, cluster_bits=BITS, bitmaps={63: 1 << 28}, backing=b"base",
                 backing_format=b"raw")  # fmt: skip
    (tmp_path / "a").write_bytes(data)

    assert b"p" * (size - PART) + b"x" * PART == disk_content(f"qcow2:{tmp_path}/a")


def test_it_cannot_grow(tmp_path: Path) -> None:
    """Such an image cannot grow, since the rest of its last cluster cannot be made zeros. It is left unchanged."""
    path = tmp_path / "a"
    path.write_bytes(qcow2(SIZE, {0: b"a" * CLUSTER}, cluster_bits=BITS, bitmaps={0: ALL}))
    before = path.read_bytes()
    with pytest.raises(DriverError, match="convert it instead"):
        resize(find_image(f"qcow2:{path}"), 100 << 20)

    assert before == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("cluster_bits", "kind"), [(14, "alone"), (16, "backed"), (21, "apart")])
def test_what_qemu_wrote(tmp_path: Path, request: pytest.FixtureRequest, cluster_bits: int, kind: str) -> None:
    """Whatever QEMU wrote, we read the same content, and so does what we convert it to. The check finds no fault."""
    chance = Random(request.config.getoption("--seed") + cluster_bits)
    base, path, raw, size = tmp_path / "base", tmp_path / "a", tmp_path / "raw", 10 * SIZE - 1024
    base.write_bytes(chance.randbytes(5 * SIZE))
    options = f"extended_l2=on,cluster_size={1 << cluster_bits}" + (
        f",data_file={tmp_path}/data" if kind == "apart" else ""
    )
    parent = ("-b", base, "-F", "raw") if kind == "backed" else ()
    qemu.qemu_img("create", "-f", "qcow2", "-o", options, *parent, path, str(size))
    commands = [] if kind == "apart" else [f"write -c -P {n} {n << cluster_bits} {1 << cluster_bits}" for n in (1, 3)]
    for _ in range(40):
        length = chance.choice([512, 1024, 4096, 65536, 299520])
        place = chance.randrange(size - length >> 9) << 9
        verb = chance.choice([f"write -P {chance.randrange(1, 255)}", "write -z", "write -z -u", "discard"])
        commands.append(f"{verb} {place} {length}")
    qemu.qemu_io(path, "qcow2", *commands)
    qemu.qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)

    assert raw.read_bytes() == disk_content(f"qcow2:{path}")
    convert(parse_chain(f"qcow2:{path}"), image_of_file("qcow2", f"{tmp_path}/new"), Wishes(), ignore)
    qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "new", raw)
    report = check(lambda offset, length: path.read_bytes()[offset : offset + length], path.stat().st_size)
    assert (0, 0, (0, 0)) == (report.errors, report.leaks, qemu.check(path))
    with Session() as session:
        found = list(map_chain(session.open(parse_chain(f"qcow2:{path}"), read_only=True).chain.layers))
    theirs = json.loads(qemu.qemu_img("map", "--output=json", "-f", "qcow2", path))
    data = [(each.start, each.length, each.place) for each in found if each.kind is Kind.DATA]
    assert data == [(each["start"], each["length"], each.get("offset")) for each in theirs if each["data"]]
