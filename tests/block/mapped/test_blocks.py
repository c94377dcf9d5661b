"""Tests of `xenbackend.block.mapped.blocks`: VHD images that are written, killed, torn, and out of space."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests import figures, vhd_images
from tests.helpers_block import content, flush, read, write
from tests.recorded import Change, Disk, RecordedFile, RecordedFiles, Session, after_power_loss, at, state, tears
from xenbackend.block.drivers.vhd import Vhd
from xenbackend.block.formats import vhd
from xenbackend.block.request import IMAGE_DAMAGED, Op, Request
from xenbackend.errors import DriverError

SIZE, BLOCK, PARENT = 256 << 10, 16 << 10, 128 << 10
SECTORS = BLOCK // 512
KINDS = ("dynamic", "differencing", "device")


class Image:
    """An image of one kind on a recorded file, with the initial content of its disk."""

    def __init__(self, kind: str, directory: Path, seed: int) -> None:
        chance = Random(seed)
        self.chance = chance
        self.path, base = at(directory / "img.vhd"), at(directory / "base.vhd")
        content = chance.randbytes(PARENT)
        parent = vhd_images.image(PARENT, _blocks(content), block_size=BLOCK, uuid=b"p" * 16)
        files = RecordedFiles()
        files.files[base] = RecordedFile(bytearray(parent), chance)
        is_child = kind == "differencing"
        names = [(b"MacX", b"file://./base.vhd")] if is_child else []
        image = vhd_images.image(SIZE, block_size=BLOCK, parent_uuid=b"p" * 16 if is_child else None, names=names)
        if kind == "device":  # as large as the image may become, and full of old data
            image = image[:-512] + chance.randbytes(SIZE + SIZE // 2) + image[-512:]
        self.start = image
        self.is_device = kind == "device"
        self.first = content.ljust(SIZE, b"\0") if is_child else bytes(SIZE)
        self.files = files
        self.file = RecordedFile(bytearray(image), chance, is_device=self.is_device)

    def open(self, file: RecordedFile | None = None, *, read_only: bool = False) -> Disk:
        """Open the disk on this file, in place of the image's own."""
        files = RecordedFiles()
        files.files = {**self.files.files, self.path: file or self.file}
        disk = Disk(f"vhd:{self.path}", files, read_only=read_only)
        disk.chance = self.chance
        return disk

    def holds(self, file: bytearray, *, read_only: bool) -> bytes:
        """Return what the disk holds if its file is this one, and close it."""
        disk = self.open(RecordedFile(file, is_device=self.is_device), read_only=read_only)
        found = disk.everything()
        disk.chain.close()
        return found

    def session(self, count: int) -> Session:
        """Send random requests."""
        session = Session(self.open(), self.file, self.first, self.chance)
        session.run(count, 64)
        return session


def _blocks(content: bytes) -> dict[int, dict[int, bytes]]:
    """Return the sectors of a disk, by block."""
    sectors = [content[place : place + 512] for place in range(0, len(content), 512)]
    return {block: dict(enumerate(sectors[block * SECTORS :][:SECTORS])) for block in range(len(sectors) // SECTORS)}


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, int], Image]:
    """Return a function that makes images. Their files count as block devices if the test says so."""

    def make(kind: str, seed: int) -> Image:
        return Image(kind, tmp_path, seed)

    return make


def seeds(config: pytest.Config) -> range:
    """Return a seed for each image to be made."""
    first: int = config.getoption("--seed")
    return range(first, first + max(1, config.getoption("--requests") // 20_000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_write(make: Callable[[str, int], Image], kind: str, request: pytest.FixtureRequest) -> None:
    """Killed at any write, or in the middle of one, a disk opens and holds answered writes, and any part of others."""
    for seed in seeds(request.config):
        image = make(kind, seed)
        session = image.session(40)
        for number, (count, torn) in enumerate(tears(image.file.log)):
            found = image.holds(state(image.start, image.file.log, count, torn), read_only=bool(number & 1))

            assert [] == session.faults_of_a_kill(found, count), (seed, count, torn)
        figures.add("crash points", number + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_power_lost(make: Callable[[str, int], Image], kind: str, request: pytest.FixtureRequest) -> None:
    """Whatever unflushed writes a power loss leaves, the disk opens and holds every flushed sector."""
    for seed in seeds(request.config):
        image = make(kind, seed)
        session = image.session(60)
        for loss in range(150):
            file, flushed = after_power_loss(image.start, image.file.log, Random(loss))

            assert [] == session.faults_of_power_loss(image.holds(file, read_only=False), flushed), (seed, loss)
        figures.add("crash points", 150)


@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_there_is_always_a_footer_at_the_end(make: Callable[[str, int], Image], kind: str) -> None:
    """After each change of the file, a footer with a correct checksum is at its end, and no write goes beyond it."""
    image = make(kind, 3)
    image.session(40)
    for count in range(len(image.file.log) + 1):
        file = bytes(state(image.start, image.file.log, count))

        _, is_at_end = vhd.read_footer(lambda offset, length, file=file: file[offset : offset + length], len(file))
        assert is_at_end


def test_the_order_of_a_first_write(make: Callable[[str, int], Image]) -> None:
    """The order of a first write: the file grows with its footer, flush, table entry, data, bitmap, answer."""
    image = make("differencing", 1)
    disk, log = image.open(), image.file.log
    disk.do(write(BLOCK + 512, b"w" * 1024))
    place = log[0].place - 4096 - BLOCK  # the footer takes the last sector of a page, behind the block
    assert 0 == place % 4096

    assert ["grow", "flush", "write", "write", "write"] == [change.kind for change in log]
    assert vhd.pack_footer(disk.chain.layers[0].driver.footer) == log[0].data
    assert Change("write", 1536, b"\xff" * 4 + ((place - 512) // 512).to_bytes(4, "big") + b"\xff" * 504) == log[2]
    assert Change("write", place + 512, b"w" * 1024) == log[3]
    assert Change("write", place - 512, b"\x60" + bytes(511)) == log[4]


def test_a_filter_may_look_at_what_it_lent(make: Callable[[str, int], Image]) -> None:
    """If a write lands after `log:` has handed its range out, the range is dirty again, where the guest wrote."""
    image = make("dynamic", 1)
    files = RecordedFiles()
    files.files = {image.path: image.file}
    disk = Disk(f"log:|vhd:{image.path}", files)
    disk.do(write(0, bytes(512)))
    disk.chain.control("log", "clear", [])
    disk.chain.submit([write(4096, b"w" * 512)])
    *page, more = disk.chain.control("log", "get", []).decode().splitlines()
    while disk.step():
        pass

    assert ["8 1"] == page
    assert b"end\n" == disk.chain.control("log", "get", [more.split()[1]])
    assert b"8 1\n" in disk.chain.control("log", "get", [])  # the next sweep


def test_what_is_there_costs_no_metadata(make: Callable[[str, int], Image]) -> None:
    """A write to sectors that the image already has writes only its data."""
    for kind in ("dynamic", "differencing"):
        image = make(kind, 1)
        disk = image.open()
        disk.do(write(0, b"1" * BLOCK))
        done = len(image.file.log)
        disk.do(*(write(place, b"2" * 512) for place in range(0, BLOCK, 1024)))

        assert {512} == {len(change.data) for change in image.file.log[done:]}
        assert BLOCK // 1024 == len(image.file.log) - done


def test_writes_of_one_batch_share_metadata(make: Callable[[str, int], Image]) -> None:
    """First writes to many sectors of many blocks in one batch grow the file once, and share tables and bitmaps."""
    image = make("differencing", 1)
    disk = image.open()
    batch = [write(block * BLOCK + sector * 1024, b"w" * 512) for block in range(4) for sector in range(8)]
    assert [0] * 32 == disk.do(*batch)
    kinds = [change.kind for change in image.file.log]

    assert 1 == kinds.count("grow")
    assert 32 < kinds.count("write") < 64


def test_reads_mix_sectors_of_image_and_parent(make: Callable[[str, int], Image]) -> None:
    """One read returns sectors of the image, of the parent, and zeros from beyond the parent's end."""
    image = make("differencing", 1)
    disk, model = image.open(), bytearray(image.first)
    for place in range(PARENT - BLOCK, PARENT + BLOCK, 2048):
        disk.do(write(place, b"c" * 512))
        model[place : place + 512] = b"c" * 512
    request = read(PARENT - BLOCK, 2 * BLOCK)

    assert [0] == disk.do(request)
    assert model[PARENT - BLOCK : PARENT + BLOCK] == content(request)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_what_fails_fails_alone(make: Callable[[str, int], Image], kind: str, code: int) -> None:
    """If the file fails at random, every request ends. Successful writes are there, both now and when opened again."""
    for seed in range(12):
        image = make(kind, seed)
        chance = Random(seed)
        session = Session(image.open(), image.file, image.first, image.chance)
        image.file.fails = lambda request, chance=chance: code if request.op and chance.random() < 0.15 else 0
        session.run(40, 64)
        image.file.fails = lambda _: 0
        now = session.disk.everything()
        session.disk.chain.close()

        assert {0, code} <= {each.status for each in session.writes} <= {0, code, errno.ENOSPC}
        assert [] == session.faults_of_a_kill(now, len(image.file.log)), seed
        later = image.holds(image.file.bytes, read_only=False)
        assert [] == session.faults_of_a_kill(later, len(image.file.log)), seed


def test_a_write_after_a_failed_one_is_durable(make: Callable[[str, int], Image]) -> None:
    """If a bitmap could not be written, the next write to its sectors writes it again."""
    image = make("differencing", 1)
    disk = image.open()
    disk.do(write(0, b"0" * 512))
    bitmap = image.file.log[0].place - 4096 - BLOCK - 512
    image.file.fails = lambda request: errno.EIO if request.op == Op.WRITE and request.offset == bitmap else 0
    assert [errno.EIO] == disk.do(write(1024, b"1" * 512))
    image.file.fails = lambda _: 0

    assert [0] == disk.do(write(1024, b"2" * 512))
    assert b"2" * 512 == image.holds(image.file.bytes, read_only=True)[1024:1536]


def test_no_room(make: Callable[[str, int], Image]) -> None:
    """On a full device a first write ends with ENOSPC, existing blocks can be written, and the footer is kept."""
    image = make("device", 1)
    del image.file.bytes[5 * BLOCK : -512]
    disk = image.open()
    found = disk.do(*(write(block * BLOCK, b"w" * 512) for block in range(8)))
    assert {0, errno.ENOSPC} == set(found) | set(disk.do(write(10 * BLOCK, b"w" * 512)))

    first = disk.do(*(write(block * BLOCK, b"v" * 512) for block in range(2)))
    assert vhd.pack_footer(disk.chain.layers[0].driver.footer) == image.file.bytes[-512:]
    assert set(first) <= {0, errno.ENOSPC}


def changed(image: Image, **fields: object) -> None:
    """Change fields of an image's header."""
    footer, _ = vhd.read_footer(image.file.read_at, image.file.size)
    header = vhd.read_header(image.file.read_at, footer, image.file.size)
    image.file.bytes[512:1536] = vhd.pack_header(replace(header, **fields))


def test_no_block_is_put_where_a_name_is(make: Callable[[str, int], Image]) -> None:
    """If the image says that a parent's name lies beyond its end, a guest could write that name. A write that needs a
    new block there is refused as damage of the image; other writes are done.
    """
    image = make("differencing", 1)
    image.open().do(write(0, b"0" * BLOCK))
    place = image.file.size + 2 * BLOCK
    changed(image, locators=(vhd.Locator(b"MacX", 512, 20, place), vhd.Locator(b"W2ku", 1, 20, 2048)))
    image.file.bytes[2048:2068] = ".\\base.vhd".encode("utf-16-le")
    disk = image.open()
    first = disk.do(write(BLOCK, b"n" * 512))
    before = bytes(image.file.bytes)

    assert [0] == first
    assert [IMAGE_DAMAGED] * 5 == disk.do(*(write(block * BLOCK, b"n" * 512) for block in range(2, 7)))
    assert [0, IMAGE_DAMAGED, 0] == disk.do(write(512, b"1" * 512), write(3 * BLOCK, b"n" * 512), flush())
    assert len(before) == image.file.size < place


def test_a_device_keeps_what_lies_behind_its_blocks(make: Callable[[str, int], Image]) -> None:
    """On a block device, new blocks begin behind everything that the image says it has there, such as a former map."""
    image = make("device", 1)
    name = 5 * BLOCK
    changed(image, locators=(vhd.Locator(b"W2ku", 512, 20, name),))
    before = bytes(image.file.bytes)
    assert [0] == image.open().do(write(0, b"n" * 512))

    assert before[2048 : name + 512] == image.file.bytes[2048 : name + 512]
    assert b"n" * 512 in image.file.bytes[name + 512 :]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"table_offset": 1024, "parent_name": bytes(448) + b"\xff" * 64}, "the header and the table overlap"),
        ({"locators": (vhd.Locator(b"W2ru", 1, 20, 1536),)}, r"the table and the parent's name \(W2ru\) overlap"),
        ({}, "the header and the map of full blocks overlap"),
    ],
)
def test_what_changes_is_written_over_nothing(
    make: Callable[[str, int], Image], fields: dict[str, object], sentence: str
) -> None:
    """A table or map that overlaps something else is never written: the image can only be opened read-only."""
    image = make("dynamic", 1)
    file = image.file.bytes
    file[:] = vhd_images.image(SIZE, block_size=BLOCK, full=[])
    if not fields:  # a map in the second half of the header, with a correct checksum
        file[2048 + 8 : 2048 + 16] = (1024).to_bytes(8, "big")
        file[2048 + 24 : 2048 + 28] = (~sum(file[1024:1536]) & 0xFFFFFFFF).to_bytes(4, "big")
    changed(image, **fields)
    before = bytes(file)
    assert bytes(SIZE) == image.holds(file, read_only=True)
    with pytest.raises(DriverError, match=f"{sentence}, so it can only be opened read-only"):
        image.open()
    assert before == file


def test_bitmaps_are_bounded(make: Callable[[str, int], Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two bitmaps only, reads and writes are right, and bitmaps are loaded again when needed."""
    monkeypatch.setattr("xenbackend.block.mapped.blocks._BITMAPS", 2 * SECTORS)
    image = make("differencing", 5)
    session = image.session(150)

    assert [] == session.faults_of_a_kill(session.disk.everything(), len(image.file.log))
    driver = session.disk.chain.layers[0].driver
    assert isinstance(driver, Vhd)
    assert len(driver._bitmaps) <= 4


def test_a_bitmap_stays_while_it_is_used(make: Callable[[str, int], Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """However few bitmaps are kept, two writes to one block that are in flight together are both in its bitmap."""
    monkeypatch.setattr("xenbackend.block.mapped.blocks._BITMAPS", SECTORS)
    image = make("differencing", 5)
    assert [0] * 5 == image.open().do(*(write(block * BLOCK, b"0" * 512) for block in range(5)))
    disk, file = image.open(), image.file
    disk.do(read(0, 512))
    early, late = write(512, b"1" * 512), write(1024, b"2" * 512)
    disk.chain.submit([early])
    data, file.waiting = file.waiting, []  # they are delayed
    for block in range(1, 5):
        disk.do(read(block * BLOCK, 512))
    disk.chain.submit([late])
    while disk.step():
        file.waiting, data = file.waiting + data, []

    assert (0, 0) == (early.status, late.status)
    assert b"1" * 512 + b"2" * 512 == image.holds(file.bytes, read_only=True)[512:1536]


def test_a_bitmap_that_cannot_be_read(make: Callable[[str, int], Image]) -> None:
    """Requests that need a bitmap that cannot be read fail. The next one tries to read it again."""
    image = make("differencing", 1)
    disk = image.open()
    disk.do(write(512, b"w" * 512))
    disk = image.open()
    image.file.fails = _reads_fail

    assert [errno.EIO] * 3 == disk.do(read(0, 512), read(512, 512), write(0, b"x" * 512))
    image.file.fails = lambda _: 0
    request = read(512, 512)
    assert [0, 0] == disk.do(request, flush())
    assert b"w" * 512 == content(request)


def _reads_fail(request: Request) -> int:
    return errno.EIO if request.op == Op.READ else 0
