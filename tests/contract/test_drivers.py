"""The same cases for every registered driver, with the asserting layer between all layers."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from descriptors import open_descriptors

from tests import luks_images, partition_tables, qcow_images, vhd_images
from tests.helpers_block import SIZE, Machine, content, discard, flush, image, read, write
from xenbackend.block.chain import Chain
from xenbackend.block.drivers import driver_names, find_driver
from xenbackend.block.request import Op, Request

PLACES = {  # for drivers that need more than their name; {file}, {qcow}, ... are fresh images of SIZE zeros
    "aio": "aio:{file}",
    "cache": "cache:{cache},size=1M,mode=writethrough|ram:1M",
    "checksum": "checksum:{sums}|ram:1M",
    "cow": "cow:{cow},block=4K|ram:1M",
    "delay": "delay:read=1us,jitter=1us|ram:1M",
    "fault": "fault:rate=0|ram:1M",
    "nbd": "nbd:unix:{server}",
    "luks": "luks:key={key}|aio:{luks}",
    "null": "null:1M",
    "offload": "offload:1M",
    "offset": "offset:start=68K,length=1M|ram:2M",
    "partition": "partition:1|aio:{disk}",
    "qcow": "qcow:{qcow}",
    "qcow2": "qcow2:{qcow2}",
    "ram": "ram:1M",
    "sync": "sync:{file}",
    "throttle": "throttle:iops=5000,bps=500M|ram:1M",
    "vhd": "vhd:{vhd}",
}
FORGETS = {"null"}  # these read zeros, whatever was written
NEEDS_CLUSTER = {"rbd"}  # tests/engines has one
ONLY_READ = {"vdi", "vhdx", "vmdk"}  # no case here can write to them: tests/block/drivers has their tests
NOT_ZERO = {"xor": 0xA5}  # the byte that an unwritten disk of this driver reads as


def usable() -> list[str]:
    """Return the drivers that can be loaded, including those of third parties."""
    names = []
    for name in set(driver_names()) - ONLY_READ - NEEDS_CLUSTER:
        try:
            find_driver(name)
        except LookupError:
            continue
        names.append(name)
    return sorted(names)  # workers of pytest-xdist must agree


SERVERS: list[subprocess.Popen[bytes]] = []  # processes of their own: descriptors are counted here


@pytest.fixture(autouse=True)
def _no_servers() -> Iterator[None]:
    """End the servers that a test has started."""
    yield
    while SERVERS:
        server = SERVERS.pop()
        server.communicate()  # ends its standard input
        assert 0 == server.returncode


def serve(path: Path) -> Path:
    """Start an NBD server for a disk of zeros, and return its socket."""
    command = [sys.executable, "-m", "tests.nbd_server", str(path), str(SIZE)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    SERVERS.append(server)
    assert server.stdout is not None
    assert b"ready\n" == server.stdout.readline()
    return path


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(params=usable())
def name(request: pytest.FixtureRequest) -> str:
    """Return one driver after the other."""
    return str(request.param)


@pytest.fixture
def chain(machine: Machine, name: str, tmp_path: Path) -> Iterator[Chain]:
    """Return an open chain with the driver in it."""
    chain = machine.open(text_of(name, tmp_path))
    yield chain
    chain.close()


def text_of(name: str, tmp_path: Path) -> str:
    """Return a chain with the driver in it, SIZE bytes large."""
    default = f"{name}:|ram:1M" if find_driver(name).is_filter else f"{name}:{{file}}"
    fixtures = {each: tmp_path / each for each in ("qcow", "qcow2", "vhd", "disk", "cow", "sums", "cache", "luks")}
    fixtures["file"] = image(tmp_path / "img")
    if name == "nbd":
        fixtures["server"] = serve(tmp_path / "nbd.sock")
    fixtures["disk"].write_bytes(partition_tables.mbr(3 * SIZE, {1: (0x83, 2048, SIZE // 512)}))
    fixtures["key"] = luks_images.key_file(tmp_path / "key")
    if name == "luks":
        fixtures["luks"].write_bytes(luks_images.luks2(luks_images.Made(bytes(SIZE))))
    fixtures["vhd"].write_bytes(vhd_images.image(SIZE, block_size=64 << 10))
    fixtures["qcow"].write_bytes(qcow_images.qcow(SIZE))
    fixtures["qcow2"].write_bytes(qcow_images.qcow2(SIZE, cluster_bits=9))
    return PLACES.get(name, default).format(**fixtures)


def pieces(random: Random, length: int) -> list[int]:
    """Cut a length into whole sectors at random places."""
    cuts = sorted(random.sample(range(1, length // 512), k=min(random.randint(0, 3), length // 512 - 1)))
    bounds = [0, *(cut * 512 for cut in cuts), length]
    return [end - start for start, end in pairwise(bounds)]


def place(random: Random) -> tuple[int, int]:
    """Return the offset and length of a random range."""
    length = random.choice([1, 1, 8, 8, random.randint(1, 64)]) * 512
    return random.randrange(0, (SIZE - length) // 512 + 1) * 512, length


def random_request(random: Random, model: bytearray, *, can_discard: bool) -> Request:
    """Return a random request, and apply it to the model as the disk should apply it."""
    offset, length = place(random)
    op = random.choice([Op.READ, Op.WRITE, Op.WRITE, Op.FLUSH, Op.DISCARD if can_discard else Op.READ])
    if op == Op.READ:
        return read(offset, *pieces(random, length))
    if op == Op.WRITE:
        parts = [random.randbytes(part) for part in pieces(random, length)]
        model[offset : offset + length] = b"".join(parts)
        return write(offset, *parts)
    if op == Op.FLUSH:
        return flush()
    model[offset : offset + length] = bytes(length)
    return discard(offset, length)


def blank(name: str) -> bytearray:
    """Return what the disk reads as before anything has been written."""
    return bytearray([NOT_ZERO.get(name, 0)]) * SIZE


@pytest.mark.parametrize("seed", range(4))
def test_the_disk_behaves_like_an_array_of_bytes(machine: Machine, chain: Chain, name: str, seed: int) -> None:
    """Any sequence of operations has the same effect, and reads the same, as on an array of bytes."""
    random, model = Random(seed), blank(name)
    for _ in range(60):
        request = random_request(random, model, can_discard=chain.geometry.can_discard)

        assert [0] == machine.do(chain, request), (seed, request)
        if request.op == Op.READ and name not in FORGETS:
            end = request.offset + request.length
            assert model[request.offset : end] == content(request), (seed, request)
    everything = read(0, SIZE)
    machine.do(chain, everything)

    assert (bytes(SIZE) if name in FORGETS else model) == content(everything), seed


def test_a_batch_comes_back_whole(machine: Machine, chain: Chain, name: str) -> None:
    """D1: when many requests are in flight at the same time, each of them comes back once, with its own data."""
    data = [bytes([number]) * 4096 for number in range(64)]
    writes = [write(number * 4096, piece) for number, piece in enumerate(data)]
    reads = [read(number * 4096, 4096) for number in range(64)]

    assert [0] * 64 == machine.do(chain, *writes)
    assert [0] * 64 == machine.do(chain, *reads)
    assert [bytes(4096)] * 64 if name in FORGETS else data == [content(each) for each in reads]


def test_operations_that_are_offered_succeed(machine: Machine, chain: Chain) -> None:
    """D6: flush and discard succeed if the geometry offers them, and end with EOPNOTSUPP if it does not."""
    expected = 0 if chain.geometry.can_discard else errno.EOPNOTSUPP

    assert [0 if chain.geometry.can_flush else errno.EOPNOTSUPP] == machine.do(chain, flush())
    assert [expected] == machine.do(chain, discard(0, 65536))


def test_a_read_fills_every_byte(machine: Machine, chain: Chain, name: str) -> None:
    """Sectors that were never written read as zeros, up to the last one, whatever the buffer held before."""
    first, last = read(0, 4096, 512), read(SIZE - 512, 512)

    assert [0, 0] == machine.do(chain, first, last)
    assert blank(name)[: 4096 + 512] == content(first)
    assert blank(name)[:512] == content(last)


def test_the_geometry_makes_sense(chain: Chain) -> None:
    """The size is a multiple of the sector size, and a discard granularity is given exactly if discard is offered."""
    geometry = chain.geometry

    assert geometry.size == SIZE
    assert geometry.size % geometry.sector_size == 0
    assert geometry.can_discard == (geometry.discard_granularity > 0)


def test_a_read_only_chain_can_be_read(machine: Machine, name: str, tmp_path: Path) -> None:
    """If a chain is opened read-only, its driver says so, offers no discard, and can be read."""
    chain = machine.open(text_of(name, tmp_path), read_only=True)
    request = read(0, 4096)

    assert [0] == machine.do(chain, request)
    assert (True, False) == (chain.geometry.read_only, chain.geometry.can_discard)
    chain.close()


def test_closing_leaves_no_descriptor(machine: Machine, name: str, tmp_path: Path) -> None:
    """A chain that was opened, used and closed leaves no descriptor open, however often."""
    text = text_of(name, tmp_path)
    counts = []
    for _ in range(3):
        chain = machine.open(text)
        machine.do(chain, write(0, bytes(4096)), read(0, 4096))
        chain.close()
        counts.append(len(open_descriptors()))

    assert counts[1] == counts[2]
