"""The driver cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.block.test_write_through import Life
from tests.helpers_block import Machine, content, read, write
from tests.recorded import RecordedFile
from xenbackend.block.formats.cache import DATA_AT
from xenbackend.errors import ChainError, DriverError

SIZE = 1 << 20


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of random bytes."""
    path = tmp_path / "image"
    path.write_bytes(Random(1).randbytes(SIZE))
    return path


@pytest.mark.parametrize("what", ["another disk", "another file", "memory", "another size"])
def test_entries_from_a_former_life_do_not_come_back(tmp_path: Path, what: str) -> None:
    """F3: the cache is empty over another disk, in another file, with another size, or if its memory was lost."""
    life = Life(tmp_path, Random(1))
    life.disk.do(read(0, 4096))
    assert life.hits(read(0, 4096))
    match what:
        case "another disk":
            life.text = life.text.replace("aio:image", "offset:length=64K|aio:image")
        case "another file":
            life.files[life.path] = RecordedFile(bytearray(4096))
        case "memory":
            life.memories.clear()
        case "another size":
            life.text = life.text.replace("size=1M", "size=2M")
    life.start()

    assert not life.hits(read(0, 4096))
    assert life.hits(read(0, 4096))


@pytest.mark.parametrize(("block", "stays"), [("32K", True), ("64K", False)])
def test_a_disk_that_has_grown(tmp_path: Path, block: str, *, stays: bool) -> None:
    """After the disk has grown, cached blocks are kept, unless the disk used to end inside a block."""
    life = Life(tmp_path, Random(1), block=block)
    for place in (0, 128 << 10):
        life.disk.do(read(place, 512))
    life.image.bytes += b"n" * (32 << 10)
    life.start()
    found = read(160 << 10, 512)
    assert [0] == life.disk.do(found)
    assert b"n" * 512 == content(found)
    assert stays == life.hits(read(0, 512))


def test_a_successor_that_cannot_open_the_file_serves_without(tmp_path: Path) -> None:
    """If a successor cannot open FILE, the guest is served without it, and what FILE held is never used again. For a
    disk that nobody uses yet, the same is an error.
    """
    life = Life(tmp_path, Random(1))
    life.disk.do(read(0, 4096))
    kept, life.files[life.path] = life.file, RecordedFile(bytearray(b"a file of somebody else's".ljust(8192)))
    life.start()
    assert "off: it is not a file of cache:" in life.driver.env.facts["cache"]
    assert [0] == life.disk.do(write(0, b"n" * 4096))
    life.files[life.path] = kept
    life.start()
    found = read(0, 4096)
    assert not life.hits(found)
    assert b"n" * 4096 == content(found)
    life.files[life.path], life.resumes = RecordedFile(bytearray(b"a file of somebody else's".ljust(8192))), False
    with pytest.raises(DriverError, match="it is not a file of cache:, and is left unchanged"):
        life.start()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("size=1M,destage=1M", "destage has no effect without mode=writeback"),
        ("size=1M,mode=fast", "'fast' is not one of read, writethrough, writeback"),
        ("size=4M,block=1M", "size is 4 MiB; with this block it must be 8 MiB to"),
        ("size=512K", "size is 512 KiB; with this block it must be 1 MiB to 256 GiB"),
        ("size=1T", "with this block it must be"),
        ("size=1M,block=5000", "it must be 4K, 8K"),
        ("mode=read", "the size is missing"),
    ],
)
def test_settings_that_cannot_be_are_refused(machine: Machine, tmp_path: Path, options: str, problem: str) -> None:
    """Settings that are impossible or have no effect are refused with a message."""
    with pytest.raises(ChainError, match=problem):
        machine.open(f"cache:{tmp_path}/cache,{options}|ram:1M")


def test_who_only_looks_touches_no_file(tmp_path: Path, image: Path) -> None:
    """`check` and commands that only read a chain go past the cache and do not touch FILE, even if it is in use."""
    machine, looking = Machine(), Machine()
    looking.make_env.serves = False
    text = f"cache:{tmp_path}/cache,size=1M|aio:{image}"
    assert image.read_bytes() == looking.contents(text)
    assert not (tmp_path / "cache").exists()
    chain = machine.open(text, read_only=True)
    give_up = machine.reactor.now() + 10
    while not chain.layers[0].driver.figures()["hits"]:
        assert [0] == machine.do(chain, read(0, 512))
        assert machine.reactor.now() < give_up
    assert image.read_bytes() == looking.contents(text)
    chain.close()
    for each in (machine, looking):
        each.close()


def test_only_as_much_is_kept_as_there_is_room_for(tmp_path: Path, image: Path) -> None:
    """FILE never exceeds the configured size, whatever is read, and every read is right."""
    machine, chance = Machine(), Random(1)
    path, data = tmp_path / "cache", image.read_bytes()
    machine.files.open_record(str(path))
    chain = machine.open(f"cache:{path},size=1M,block=64K,mode=writethrough|aio:{image}")
    for _ in range(300):
        place = chance.randrange(0, SIZE // 4096) * 4096
        found = read(place, 4096)
        assert [0] == machine.do(chain, found)
        assert data[place : place + 4096] == content(found)
    chain.close()
    machine.close()

    assert path.stat().st_size == DATA_AT + (1 << 20)


@pytest.mark.parametrize(
    "modes", [("read", "writethrough"), ("writethrough", "read"), ("writethrough", "writethrough")]
)
def test_a_cache_below_a_cache(machine: Machine, tmp_path: Path, image: Path, modes: tuple[str, str]) -> None:
    """With a cache below another one, each returns the requests that it was lent and consumes those that it made."""
    layers = [f"cache:{tmp_path}/{number},size=1M,mode={mode}" for number, mode in enumerate(modes)]
    chain = machine.open("|".join([*layers, f"aio:{image}"]))
    data = bytes(range(256)) * 64
    asked = read(0, len(data))

    assert [0, 0, 0] == [
        *machine.do(chain, write(0, data)),
        *machine.do(chain, asked),
        *machine.do(chain, read(0, 512)),
    ]
    assert data == content(asked)
    chain.close()
    assert data == image.read_bytes()[: len(data)]
