"""The driver cow."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, again, discard, flush, read, write
from tests.lives import Life
from tests.recorded import Disk, RecordedFile, RecordedFiles, Session, after_power_loss, at, state, tears
from xenbackend.block.formats.cow import Header
from xenbackend.block.request import Op
from xenbackend.cli.main import main
from xenbackend.errors import ChainError, DriverError

SIZE = 1 << 20
BLOCK = 4096


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image of random bytes."""
    path = tmp_path / "base"
    path.write_bytes(Random(1).randbytes(SIZE))
    return path


def test_the_base_is_only_read(machine: Machine, tmp_path: Path, base: Path) -> None:
    """Several disks can start from one image. Each keeps its own writes, and the image is never written."""
    before = base.read_bytes()
    chains = [machine.open(f"cow:{tmp_path}/{name}|aio:{base}") for name in "ab"]
    for chain, byte in zip(chains, (b"a", b"b"), strict=True):
        assert [0, 0] == machine.do(chain, write(70000 // 512 * 512, byte * 1024), write(0, byte * 512))
    assert chains[0].layers[1].geometry.read_only
    for chain in chains:
        chain.close()
    for name in "ab":
        found = machine.contents(f"cow:{tmp_path}/{name}|aio:{base}")
        expected = bytearray(before)
        expected[:512] = name.encode() * 512
        expected[69632 : 69632 + 1024] = name.encode() * 1024
        assert expected == found

    assert before == base.read_bytes()


def test_partial_first_writes_to_one_block_all_arrive(machine: Machine, tmp_path: Path, base: Path) -> None:
    """D3: sixteen first writes of 512 bytes to one block in one batch all arrive, with the bytes between them kept."""
    chain = machine.open(f"cow:{tmp_path}/cow|delay:read=2ms,jitter=2ms|aio:{base}")
    places = [1024 * number for number in range(16)]
    writes = [write(place, bytes([number]) * 512) for number, place in enumerate(places)]

    assert [0] * 16 == machine.do(chain, *writes)
    expected = bytearray(base.read_bytes())
    for number, place in enumerate(places):
        expected[place : place + 512] = bytes([number]) * 512
    assert expected == machine.everything(chain)
    assert {"own": 1, "zeros": 0} == chain.layers[0].driver.figures()
    chain.close()


def test_a_discard_never_uncovers_the_base(machine: Machine, tmp_path: Path) -> None:
    """D3: discarded blocks read as zeros, also after a partial write and in a successor, and the file shrinks."""
    base, cow = tmp_path / "base", tmp_path / "cow"
    base.write_bytes(b"\xaa" * SIZE)
    text = f"cow:{cow}|aio:{base}"
    chain = machine.open(text)
    assert [0] == machine.do(chain, write(0, b"w" * (SIZE // 2)))
    taken = cow.stat().st_blocks
    assert [0, 0] == machine.do(chain, discard(0, SIZE - 65536), discard(SIZE - 512, 512))
    assert [0, 0] == machine.do(chain, write(512, b"x" * 512), write(SIZE // 2 + 512, b"y" * 512))
    expected = bytearray(SIZE)
    expected[SIZE - 65536 : SIZE - 512] = b"\xaa" * (65536 - 512)
    expected[512:1024], expected[SIZE // 2 + 512 : SIZE // 2 + 1024] = b"x" * 512, b"y" * 512
    assert expected == machine.everything(chain)
    assert cow.stat().st_blocks < taken
    chain.close()

    assert expected == machine.contents(text)


@pytest.mark.parametrize("change", ["a byte", "another file", "size", "shorter", "header", "no cow", "empty"])
def test_a_file_that_does_not_fit_is_refused(machine: Machine, tmp_path: Path, base: Path, change: str) -> None:
    """D2: if the base was changed or replaced, or the file is truncated or damaged, it is refused and not changed."""
    cow = tmp_path / "cow"
    text = f"cow:{cow}|aio:{base}"
    chain = machine.open(text)
    machine.do(chain, write(0, bytes(512)))
    chain.close()
    problem = "has been replaced or changed since then; restore the former one, or remove the file"
    match change:
        case "a byte":
            with base.open("r+b") as file:
                file.write(b"x")
        case "another file":
            (tmp_path / "new").write_bytes(base.read_bytes())
            (tmp_path / "new").rename(base)
        case "size":
            base.write_bytes(bytes(2 * SIZE))
            problem = "has 2097152 bytes now, and had 1048576"
        case "shorter":
            os.truncate(cow, 1 << 20)
            problem = "it has been truncated"
        case "header":
            with cow.open("r+b") as file:
                file.seek(60)
                file.write(b"!")
            problem = "its header is damaged"
        case "no cow":
            cow.write_bytes(b"precious" * 1024)
            problem = "it is not a file of cow:, and is left unchanged"
        case "empty":
            cow.write_bytes(b"")
            machine.open(text).close()
            return
    before = cow.read_bytes()
    with pytest.raises(DriverError, match=problem):
        machine.open(text)

    assert before == cow.read_bytes()


def test_what_was_only_read_is_not_begun(machine: Machine, tmp_path: Path, base: Path) -> None:
    """A new file that is opened read-only shows the base and is not begun. A writer may choose another block size."""
    text = f"cow:{tmp_path}/cow|aio:{base}"
    assert base.read_bytes() == machine.contents(text)
    chain = machine.open(f"cow:{tmp_path}/cow,block=8K|aio:{base}")
    assert [0] == machine.do(chain, write(0, b"x" * 512))
    chain.close()

    assert b"x" * 512 + base.read_bytes()[512:] == machine.contents(text)


def test_two_cannot_have_one_file(machine: Machine, tmp_path: Path, base: Path) -> None:
    """The file is locked while it is open, and must not be a symbolic link."""
    cow = tmp_path / "cow"
    chain = machine.open(f"cow:{cow}|aio:{base}")
    (tmp_path / "link").symlink_to(cow)
    with pytest.raises(DriverError, match="is locked by another process"):
        machine.open(f"cow:{cow}|aio:{base}")
    with pytest.raises(DriverError):
        machine.open(f"cow:{tmp_path}/link|aio:{base}")
    chain.close()


@pytest.mark.parametrize("block", ["2K", "3K", "2M", "0"])
def test_odd_blocks_are_refused(block: str, tmp_path: Path, machine: Machine) -> None:
    """The block size must be a power of two from 4 KiB to 1 MiB."""
    with pytest.raises(ChainError, match="it must be 4K, 8K"):
        machine.open(f"cow:{tmp_path}/cow,block={block}|ram:1M")


def test_a_full_file_system_leaves_reads_and_discards(tmp_path: Path) -> None:
    """D1: if there is no room for a new block, its write ends with ENOSPC. Reads, flushes and writes to existing blocks
    go on, and the same write succeeds once there is room.
    """
    path, first, file = at(tmp_path / "cow"), Random(3).randbytes(64 << 10), RecordedFile(bytearray(4096))
    disk = Disk(f"cow:{path},block=4K|aio:base", RecordedFiles(**{path: file, "base": RecordedFile(bytearray(first))}))
    assert [0] == disk.do(write(0, b"a" * 512))
    data_at = Header(64 << 10, BLOCK, "", b"").data_at
    file.fails = lambda request: errno.ENOSPC if request.op == Op.WRITE and request.offset >= data_at + BLOCK else 0
    late = [write(BLOCK, b"b" * 512), write(BLOCK + 512, b"c" * 512), write(0, b"d" * 512), read(BLOCK, 512), flush()]

    assert [errno.ENOSPC, errno.ENOSPC, 0, 0, 0] == disk.do(*late)
    file.fails = lambda request: 0
    assert [0, 0] == disk.do(*map(again, late[:2]))
    assert b"d" * 512 + first[512:BLOCK] + b"b" * 512 + b"c" * 512 + first[BLOCK + 1024 :] == disk.everything()


@pytest.mark.parametrize("life", range(4))
@pytest.mark.parametrize("block", ["4K", "16K"])
def test_power_lost_anywhere(tmp_path: Path, request: pytest.FixtureRequest, block: str, life: int) -> None:
    """After a power loss, torn and reordered, flushed data are intact, and so are neighbours of unflushed writes."""
    chance = Random(f"{request.config.getoption('--seed')} {life}")
    first, path, file = chance.randbytes(64 << 10), at(tmp_path / "cow"), RecordedFile(bytearray(4096), chance)
    base = RecordedFile(bytearray(first))
    disk = Disk(f"cow:{path},block={block}|aio:base", RecordedFiles(**{path: file, "base": base}))
    guest = Session(disk, file, first, chance)
    begun, start = len(file.log), bytes(file.bytes)
    guest.run(80, 8)
    assert any(each.kind == "flush" for each in file.log[begun:])
    for _ in range(120):
        data, flushed = after_power_loss(start, file.log[begun:], chance)
        files = RecordedFiles(**{path: RecordedFile(data), "base": RecordedFile(bytearray(first))})
        found = Disk(f"cow:{path}|aio:base", files).everything()
        assert [] == guest.faults_of_power_loss(found, flushed + begun)


def test_a_begun_file_is_begun_anew(tmp_path: Path) -> None:
    """If a worker is killed while it makes the file, torn or not, the next one makes it again over the base."""
    first, path, file = Random(4).randbytes(64 << 10), at(tmp_path / "cow"), RecordedFile(bytearray(4096))
    Disk(f"cow:{path}|aio:base", RecordedFiles(**{path: file, "base": RecordedFile(bytearray(first))}))
    assert len(file.log) > 3
    for count, torn in tears(file.log):
        left = RecordedFile(state(bytes(4096), file.log, count, torn))
        disk = Disk(f"cow:{path}|aio:base", RecordedFiles(**{path: left, "base": RecordedFile(bytearray(first))}))
        assert [0, 0] == disk.do(write(512, b"x" * 512), flush())
        assert first[:512] + b"x" * 512 + first[1024:] == disk.everything(), (count, torn)


@pytest.mark.parametrize("seed", range(12))
def test_killed_anywhere(tmp_path: Path, seed: int) -> None:
    """D11: over 40 deaths with writes, discards and flushes in flight, which are done again, nothing is lost."""
    chance = Random(seed)
    first, path = chance.randbytes(64 << 10), at(tmp_path / "cow")
    file = RecordedFile(bytearray(4096), chance, can_discard=True, discard_granularity=4096)
    files = {path: file, "base": RecordedFile(bytearray(first), chance)}
    life, model = Life(f"cow:{path},block=8K|aio:base", files, chance), bytearray(first)
    for _ in life.die(40, model, ops=[Op.DISCARD, Op.WRITE, Op.WRITE], longest=40):
        assert model == life.disk.everything()


def test_another_file_of_the_same_name_has_its_own_map(tmp_path: Path) -> None:
    """If another file was put in FILE's place, the map in memory is not used. A new file shows the base."""
    first, path = Random(5).randbytes(64 << 10), at(tmp_path / "cow")
    files = {path: RecordedFile(bytearray(4096)), "base": RecordedFile(bytearray(first))}
    life = Life(f"cow:{path},block=8K|aio:base", files, Random(0))
    assert [0] == life.disk.do(write(0, bytes(64 << 10)))
    files[path] = RecordedFile(bytearray(4096))
    Path(path).rename(tmp_path / "former")
    at(Path(path))
    life.start()

    assert first == life.disk.everything()


def test_a_flush_puts_nothing_into_the_map_that_is_not_durable(tmp_path: Path) -> None:
    """A flush writes the map between two flushes of FILE: after the data are durable, and before the answer."""
    first, path, file = bytes(64 << 10), at(tmp_path / "cow"), RecordedFile(bytearray(4096))
    disk = Disk(f"cow:{path},block=4K|aio:base", RecordedFiles(**{path: file, "base": RecordedFile(bytearray(first))}))
    begun = len(file.log)
    assert [0] == disk.do(write(0, b"x" * 512))
    assert [BLOCK] == [len(each.data) for each in file.log[begun:]]
    assert [0, 0] == disk.do(flush(), flush())
    kinds = [(each.kind, each.place) for each in file.log[begun + 1 :]]

    assert [("flush", 0), ("write", 4096), ("flush", 0)] == kinds[:3]
    assert {("flush", 0)} >= set(kinds[3:])


def test_what_was_written_can_be_kept(machine: Machine, tmp_path: Path, base: Path) -> None:
    """A detached chain can be converted like any image, so that what was written becomes an image of its own."""
    text = f"cow:{tmp_path}/cow,block=8K|aio:{base}"
    chain = machine.open(text)
    assert [0, 0] == machine.do(chain, write(4096, b"k" * 20480), discard(65536, 65536))
    expected = machine.everything(chain)
    chain.close()
    assert 0 == main(["image", "convert", text, f"aio:{tmp_path}/kept"])

    assert expected == (tmp_path / "kept").read_bytes()


def test_without_a_file_nothing_is_left(tmp_path: Path, base: Path) -> None:
    """D2: without FILE, what was written lies in an unnamed file and is gone when the disk is closed."""
    (tmp_path / "scratch").mkdir()
    before, text = base.read_bytes(), f"cow:block=8K|aio:{base}"
    machine = Machine(scratch=str(tmp_path / "scratch"))
    chain = machine.open(text)
    assert str(tmp_path / "scratch") == chain.layers[0].driver.env.facts["scratch"]
    assert [0, 0, 0] == machine.do(chain, write(512, b"x" * 1024), discard(65536, 8192), flush())
    assert before[:512] + b"x" * 1024 + before[1536:65536] + bytes(8192) + before[73728:] == machine.everything(chain)
    assert [] == list((tmp_path / "scratch").iterdir())
    chain.close()

    assert before == machine.contents(text) == base.read_bytes()
    machine.close()


def test_of_two_unnamed_files_one_is_written_to(tmp_path: Path, base: Path) -> None:
    """Of two unnamed layers in one chain, the upper one is written to. The lower one is only read and needs no file."""
    machine = Machine(scratch=str(tmp_path))
    chain = machine.open(f"cow:|log:|cow:|aio:{base}")
    assert [0] == machine.do(chain, write(0, b"x" * 512))
    assert b"x" * 512 + base.read_bytes()[512:] == machine.everything(chain)
    chain.close()
    machine.close()
