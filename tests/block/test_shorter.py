"""Files of a chain that another program makes shorter while the disk is in service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from tests import places
from tests.helpers_block import Machine, content, flush, image, read, write
from tests.memories import Memories
from tests.qcow_images import qcow2
from xenbackend.block.chain import Chain
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.image.create import create
from xenbackend.image.names import image_of_file
from xenbackend.worker.env import EnvFactory

SIZE, PIECE = 1 << 20, 16384
CHAINS = {
    "aio:{0}": "0",
    "aio:{0},cache=on": "0",
    "cow:{0}|aio:{1}": "0",
    "checksum:{0}|aio:{1}": "0",
    "checksum:{0}|aio:{1} below": "1",
    "cache:{0},size=4M,mode=writeback|aio:{1}": "0",
    "cache:{0},size=4M,mode=writethrough|aio:{1}": "0",
    "qcow2:{0}": "0",
    "vhd:{0}": "0",
}


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a directory on a disk, where direct I/O is possible."""
    made = places.DISK / f"{places.prefix()}{os.getpid()}"
    made.mkdir()
    yield made
    for each in made.iterdir():
        each.unlink()
    made.rmdir()


def made(text: str, home: Path) -> tuple[str, Path]:
    """Make the files of a chain; return its text, and the file that becomes shorter."""
    paths = home / "file", home / "below"
    if text.startswith(("qcow2", "vhd")):
        create(text.partition(":")[0], str(paths[0]), SIZE)
    elif text.startswith("aio"):
        image(paths[0], SIZE)
    image(paths[1], SIZE)
    return text.partition(" ")[0].format(*paths), paths[int(CHAINS[text])]


@pytest.mark.parametrize("keeps", [0, 0.3, 0.9])
@pytest.mark.parametrize("text", CHAINS)
def test_nothing_that_was_lost_reads_as_zeros(home: Path, text: str, keeps: float) -> None:
    """F2: whatever the guest writes after another program has made a file shorter, a read returns what was answered
    last, or an error.
    """
    chain_text, file = made(text, home)
    chance = Random(1)
    machine = Machine()
    chain = machine.open(chain_text)
    model = {place: chance.randbytes(PIECE) for place in range(0, SIZE, PIECE)}
    assert {0} == {*machine.do(chain, *(write(place, data) for place, data in model.items()))}
    assert [0] == machine.do(chain, flush())
    os.truncate(file, int(file.stat().st_size * keeps))
    for place in chance.sample(sorted(model), 20):
        data = chance.randbytes(PIECE)
        if machine.do(chain, write(place, data)) == [0]:
            model[place] = data
        else:
            del model[place]  # it may have parts of both contents
    check(machine, chain, model)
    with suppress(OSError, XenbackendError):
        chain.close()
    machine.close()


@pytest.mark.parametrize("size", ["keep", "lose"])
@pytest.mark.parametrize("text", ["cow:{0}|aio:{1}", "cache:{0},size=4M,mode=writeback|aio:{1}"])
def test_a_successor_refuses_a_file_that_was_emptied(home: Path, text: str, size: str) -> None:
    """F2: a worker's successor does not take a file that was emptied, and had data of the guest, for a new one, also if
    it was made as long as it was; a new file in its place is initialised.
    """
    chain_text, file = made(text, home)
    machine = Machine()
    memories = begin(machine)
    chain = machine.open(chain_text)
    assert [0] == machine.do(chain, write(0, b"d" * PIECE))
    chain.close()
    length = file.stat().st_size
    os.truncate(file, 0)
    if size == "keep":
        os.truncate(file, length)
    succeed(machine, memories)
    with pytest.raises(DriverError, match="it is empty, and had data"):
        machine.open(chain_text)
    file.rename(home / "former")
    machine.open(chain_text).close()
    machine.close()


def begin(machine: Machine) -> dict[str, int]:
    """Have the machine be the first worker of a disk; return the memories that it leaves for a successor, by name."""
    memories = Memories()
    machine.make_env = EnvFactory(machine.reactor, machine.files, serves=True, make=memories.make)
    return memories.kept


def succeed(machine: Machine, memories: dict[str, int]) -> None:
    """Have the machine be the successor of a worker that left these memories."""
    machine.make_env.close()
    machine.make_env = EnvFactory(machine.reactor, machine.files, memories, serves=True, resumes=True, continues=True)


def fill(machine: Machine, chain_text: str) -> None:
    """Write to each sector of a disk."""
    chain = machine.open(chain_text)
    assert [0] == machine.do(chain, write(0, os.urandom(SIZE)))
    assert [0] == machine.do(chain, flush())
    chain.close()


@pytest.mark.parametrize(("loses", "grows"), [(512, True), (65536, True), (SIZE // 2, True), (512, False)])
@pytest.mark.parametrize("image_format", ["qcow2", "qcow", "vhd"])
def test_a_successor_refuses_an_image_that_was_cut_off(
    home: Path, image_format: str, loses: int, *, grows: bool
) -> None:
    """F2: QCOW does not say where its file ends, VHD mends an end that is missing, and what is behind reads as zeros.
    So a worker's successor compares the file's size with what it was at last, also after it had grown; it refuses a
    shorter one each time, and does not make it longer. It takes one that was restored, and another file.
    """
    file, machine = home / "file", Machine()
    chain_text = f"{image_format}:{file}"
    create(image_format, str(file), SIZE)
    if not grows:
        fill(machine, chain_text)
    memories = begin(machine)
    if grows:
        fill(machine, chain_text)
    else:
        machine.open(chain_text).close()
    whole = file.read_bytes()
    os.truncate(file, len(whole) - loses)
    succeed(machine, memories)
    for _ in range(2):
        with pytest.raises(DriverError, match=f"it has {len(whole) - loses} of the {len(whole)} bytes that it had"):
            machine.open(chain_text)
    assert whole[:-loses] == file.read_bytes()

    with file.open("r+b") as restored:
        restored.write(whole)
    machine.open(chain_text).close()
    file.rename(home / "former")
    create(image_format, str(file), SIZE)
    machine.open(chain_text).close()
    machine.close()


@pytest.mark.parametrize("loses", [100, SIZE // 2])
def test_a_successor_refuses_a_data_file_that_was_cut_off(home: Path, loses: int) -> None:
    """F2: an external data file is compared, too: one that lost a part of a sector would be made whole by zeros, and
    nobody is told to extend by zeros what has lost data. It takes one that was restored.
    """
    file, data, machine = home / "file", home / "data", Machine()
    file.write_bytes(qcow2(SIZE, data_name=b"data"))
    image(data, SIZE)
    chain_text = f"qcow2:{file},data_file={data}"
    memories = begin(machine)
    chain = machine.open(chain_text)
    assert [0, 0] == [*machine.do(chain, write(0, os.urandom(SIZE))), *machine.do(chain, flush())]
    chain.close()
    whole = data.read_bytes()
    os.truncate(data, SIZE - loses)
    succeed(machine, memories)
    for _ in range(2):
        with pytest.raises(DriverError, match=f"it has {SIZE - loses} of the {SIZE} bytes that it had in service"):
            machine.open(chain_text)
    assert whole[:-loses] == data.read_bytes()

    data.write_bytes(whole)
    chain = machine.open(chain_text)
    assert whole == machine.everything(chain)
    chain.close()
    machine.close()


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_a_successor_refuses_a_file_that_is_only_read(home: Path, base_format: str) -> None:
    """F2: what a parent, or a disk that is only read, has lost is not read as zeros by a worker's successor, either.
    The files of a chain have one memory for that.
    """
    below, file = home / "below", home / "file"
    image(below, SIZE) if base_format == "raw" else create("qcow2", str(below), SIZE)
    create("qcow2", str(file), None, parent=image_of_file(base_format, str(below)))
    layer = "aio" if base_format == "raw" else base_format
    for text, read_only in ((f"qcow2:{file}", False), (f"{layer}:{below}", True)):
        machine = Machine()
        memories = begin(machine)
        machine.open(text, read_only=read_only).close()
        whole = below.read_bytes()
        os.truncate(below, len(whole) - 512)
        succeed(machine, memories)
        with pytest.raises(DriverError, match=f"it has {len(whole) - 512} of the {len(whole)} bytes that it had"):
            machine.open(text, read_only=read_only)
        below.write_bytes(whole)
        machine.open(text, read_only=read_only).close()
        assert ["lengths"] == [*memories]
        machine.close()


def test_a_worker_s_own_next_chain_is_compared(home: Path) -> None:
    """F2: what a chain in service has lost is not read as zeros by the next one of the same worker, either, such as the
    former chain after a failed exchange. Before the first chain is in service, no guest has lost anything.
    """
    file, machine = home / "file", Machine()
    create("qcow2", str(file), SIZE)
    new = file.read_bytes()
    fill(machine, f"qcow2:{file}")
    file.write_bytes(new)
    machine.open(f"qcow2:{file}").close()
    machine.make_env.drop_unwanted()
    fill(machine, f"qcow2:{file}")
    os.truncate(file, file.stat().st_size - 512)

    with pytest.raises(DriverError, match="bytes that it had in service"):
        machine.open(f"qcow2:{file}")
    machine.close()


def test_an_image_that_the_disk_had_left_may_be_shorter(home: Path) -> None:
    """F2: an image that comes back to the disk after another one was in service may have been made anew meanwhile."""
    machine = Machine()
    machine.make_env = EnvFactory(machine.reactor, machine.files, serves=True, resumes=True)
    images = [home / "first", home / "second"]
    for each in images:
        create("qcow2", str(each), SIZE)
    new = images[0].read_bytes()
    fill(machine, f"qcow2:{images[0]}")
    for each in images:
        machine.open(f"qcow2:{each}").close()
        machine.make_env.drop_unwanted()
    images[0].write_bytes(new)

    machine.open(f"qcow2:{images[0]}").close()
    machine.close()


@pytest.mark.parametrize("keeps", [0, 0.5])
@pytest.mark.parametrize("mode", ["read", "writethrough"])
def test_a_copy_that_was_cut_off_is_not_missed(home: Path, mode: str, keeps: float) -> None:
    """A cache that only has copies may become shorter: no request fails, the disk does not pause, and `set` opens the
    file again, which begins empty.
    """
    chain_text, file = f"cache:{home / 'file'},size=4M,mode={mode}|aio:{home / 'below'}", home / "file"
    image(home / "below", SIZE)
    machine, said = Machine(), []
    machine.files.on_short = said.append
    model = {place: os.urandom(PIECE) for place in range(0, SIZE, PIECE)}
    for is_cut_off in (False, True):
        chain = machine.open(chain_text)
        if is_cut_off:
            os.truncate(file, int(file.stat().st_size * keeps))
        for _ in range(2):
            reads = [read(place, PIECE) for place in model]
            writes = [write(place, data) for place, data in model.items()]
            assert {0} == {*machine.do(chain, *writes), *machine.do(chain, flush()), *machine.do(chain, *reads)}
            assert [*model.values()] == [content(each) for each in reads]
        chain.close()  # after its last writes to the file
    machine.reactor.call_soon(machine.reactor.stop)
    machine.reactor.run()
    assert [] == said

    chain = machine.open(chain_text)
    os.truncate(file, 0)
    machine.files.check_free(str(file), read_only=False, shareable=False)
    chain.close()
    machine.close()


def check(machine: Machine, chain: Chain, model: dict[int, bytes]) -> None:
    """Check that each read returns what was written, or an error."""
    for place, data in model.items():
        request = read(place, PIECE)
        assert machine.do(chain, request) != [0] or content(request) == data, f"{place}: {content(request)[:8]!r}"
