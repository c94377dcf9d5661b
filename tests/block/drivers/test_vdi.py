"""vdi, vhdx, vmdk: disks that QEMU wrote, alone and as parents, and images with random damage."""

from __future__ import annotations

import errno
import resource
import time
from pathlib import Path
from random import Random
from struct import pack

import pytest

from tests import qemu
from tests.block.drivers.test_qcow2 import random_guest
from tests.foreign_images import GRAIN, MIB, vdi, vhdx, vhdx_entry, vhdx_ring, vmdk
from tests.helpers_block import Machine, content, read, write
from tests.qcow_images import qcow2
from xenbackend.errors import DriverError

pytestmark = pytest.mark.usefixtures("parents_anywhere")

SIZE = 8 * MIB + 1536
FORMATS = {
    "vdi": ("vdi", ""),
    "vdi, fixed": ("vdi", "static=on"),
    "vhdx": ("vhdx", "block_size=1M"),
    "vhdx, large blocks": ("vhdx", "block_size=32M"),
    "vhdx, fixed": ("vhdx", "subformat=fixed"),
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "vmdk, zeroed grains": ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    "vmdk, compressed": ("vmdk", "subformat=streamOptimized"),
    "vmdk, flat": ("vmdk", "subformat=monolithicFlat"),
    "vmdk, flat in parts": ("vmdk", "subformat=twoGbMaxExtentFlat"),
    "vmdk, sparse in parts": ("vmdk", "subformat=twoGbMaxExtentSparse"),
}
LOG = b"identity of log1"
RING = vhdx_ring({  # two entries, the first of which wraps around to the beginning
    MIB - 4096: vhdx_entry(LOG, 7, MIB - 4096, [(MIB, pack("<QQ", 3 * MIB | 6, 0).ljust(4096, b"\0"))]),
    4096: vhdx_entry(LOG, 8, MIB - 4096, [(MIB, 4096)], flushed=MIB, last=8 * MIB),
})  # fmt: skip
SMALL = {  # made by hand, to be damaged
    "vdi": vdi(4 * MIB, {1: b"v" * MIB}),
    "vhdx": vhdx(4 * MIB, {1: b"v" * MIB}),
    "vhdx, not closed": vhdx(4 * MIB, {1: b"v" * MIB}, log=LOG, ring=RING),
    "vmdk": vmdk(4 * MIB, {1: b"v" * GRAIN, 2: None}),
    "vmdk, compressed": vmdk(4 * MIB, {1: b"v" * GRAIN}, compressed=True, at_end=True),
}


def disk(chance: Random, size: int = SIZE) -> bytes:
    """Return a disk with holes, with bytes that compress well and bytes that do not."""
    pieces = []
    while sum(map(len, pieces)) < size:
        length = chance.randint(1, 2 * GRAIN // 512) * 512
        pieces.append(
            chance.choice([bytes(length * 4), chance.randbytes(length), chance.randbytes(64) * (length // 64)])
        )
    return b"".join(pieces)[:size]


def converted(directory: Path, name: str, data: bytes) -> str:
    """Let qemu-img convert a disk to a format, and return the text of its layer."""
    image_format, options = FORMATS[name]
    (directory / "raw").write_bytes(data)
    path = directory / f"image.{image_format}"
    more = ("-o", options) if options else ()
    qemu.qemu_img("convert", "-f", "raw", "-O", image_format, *more, directory / "raw", path)
    return f"{image_format}:{path}"


@pytest.mark.parametrize("name", FORMATS)
def test_what_qemu_wrote(machine: Machine, tmp_path: Path, name: str) -> None:
    """A disk that qemu-img converted reads as the original: as a whole, in random pieces, and with concurrent reads."""
    chance = Random(1)
    data = disk(chance)
    text = converted(tmp_path, name, data)
    chain = machine.open(text, read_only=True)
    requests = [read(chance.randrange(len(data) >> 9) << 9, 512) for _ in range(200)]
    requests += [read(chance.randrange(len(data) - 300_032 >> 9) << 9, 300_032) for _ in range(20)]
    requests.append(read(0, chain.geometry.size))
    assert [0] * len(requests) == machine.do(chain, *requests)
    chain.close()

    for request in requests:
        assert data[request.offset :][: request.length].ljust(request.length, b"\0") == content(request)


@pytest.mark.parametrize("name", ["vdi", "vhdx", "vmdk"])
def test_blocks_in_any_order(machine: Machine, tmp_path: Path, name: str) -> None:
    """Blocks that are in another order in the file than on the disk are found, also by a request across them."""
    path = tmp_path / "image"
    qemu.qemu_img("create", "-f", name, *(("-o", "block_size=1M") if name == "vhdx" else ()), path, "16M")
    qemu.qemu_io(path, name, *(f"write -P {number} {number}M 1M" for number in (9, 4, 5, 3, 15)))

    found = machine.contents(f"{name}:{path}")
    assert b"".join(bytes([number if number in (3, 4, 5, 9, 15) else 0]) * MIB for number in range(16)) == found


@pytest.mark.parametrize("name", FORMATS)
def test_a_parent(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """A QCOW2 image over such a disk can be written, and QEMU reads both as we do."""
    model = bytearray(disk(Random(2)))
    text = converted(tmp_path, name, bytes(model))
    image_format, _, path = text.partition(":")
    child = tmp_path / "child"
    qemu.qemu_img("create", "-f", "qcow2", "-b", path, "-F", image_format, child, str(len(model)))
    before = Path(path).read_bytes()
    random_guest(machine, f"qcow2:{child}", model, Random(3), request.config.getoption("--requests") // 200)
    (tmp_path / "raw").write_bytes(model)

    qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", child, tmp_path / "raw")
    assert before == Path(path).read_bytes()


@pytest.mark.parametrize("name", SMALL)
def test_a_writer_is_refused(machine: Machine, tmp_path: Path, name: str) -> None:
    """A disk of a read-only format is refused for writing. A write that comes all the same is refused too."""
    path = tmp_path / "image"
    path.write_bytes(SMALL[name])
    text = f"{name.partition(',')[0]}:{path}"
    with pytest.raises(DriverError, match="it can only be read; attach the disk read-only"):
        machine.open(text)
    chain = machine.open(text, read_only=True, checked=False)
    assert [errno.EROFS] == machine.do(chain, write(MIB, b"w" * 512))
    chain.close()
    assert SMALL[name] == path.read_bytes()


def test_a_parent_whose_format_is_said_by_the_chain(machine: Machine, tmp_path: Path) -> None:
    """If an image does not give its parent's format, the chain can."""
    (tmp_path / "base").write_bytes(SMALL["vdi"])
    (tmp_path / "a").write_bytes(qcow2(4 * MIB, backing=b"base"))

    assert SMALL["vdi"][-MIB:] == machine.contents(f"qcow2:{tmp_path}/a,parent_format=vdi")[MIB : 2 * MIB]


def look(machine: Machine, text: str) -> None:
    """Open a disk and read some of it. A refusal is accepted."""
    try:
        chain = machine.open(text, read_only=True, checked=False)
    except DriverError:
        return
    length = min(chain.geometry.size, 2 * MIB)
    step = chain.geometry.sector_size
    machine.do(chain, read(0, length), read((chain.geometry.size - step) // step * step, step))
    chain.close()


def fuzz(machine: Machine, path: Path, name: str, chance: Random, count: int) -> float:
    """Open images with random damage outside of their data. Return the seconds that the slowest took."""
    good = SMALL[name]
    places = [place for place, byte in enumerate(good) if byte and byte != ord("v")] + list(range(512))
    slowest = 0.0
    for _ in range(count):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            place = chance.choice(places)
            width = chance.choice([1, 1, 2, 4, 8])
            value = chance.choice(
                [bytes(width), b"\xff" * width, b"\x7f" * width, b"\1" + bytes(width - 1), chance.randbytes(width)]
            )
            data[place : place + width] = value
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) // 512 * 512 :]
        path.write_bytes(data)
        begin = time.process_time()
        look(machine, f"{name.partition(',')[0]}:{path}")
        slowest = max(slowest, time.process_time() - begin)
    return slowest


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_random_damage(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """A damaged image is read, or refused by one kind of error, within a second and 512 MiB."""
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the peak of everything that this process did
    assert fuzz(machine, tmp_path / "image", name, chance, count) < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10
