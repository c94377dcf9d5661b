"""Random chains of up to five layers over every source that can be written to, compared with a plain disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests import luks_images, qcow_images, vhd_images
from tests.helpers_block import Machine, content, discard, flush, read, write
from tests.partition_tables import mbr
from xenbackend.block.request import Op, Request
from xenbackend.units import SECTOR

SIZE = 256 << 10
PART = 64 << 10  # where the partition of each disk begins
PLAIN = SIZE - (36 << 10)  # bytes of the disk, where that is encrypted
GROUPS = 10  # tests among which the chains are divided

# A discard of part of a cluster changes nothing. If clusters are one sector large, no discard covers only a part.
SOURCES: dict[str, Callable[[Path], object]] = {
    "aio:{}": lambda path: path.write_bytes(bytes(SIZE)),
    "aio:{},cache=on": lambda path: path.write_bytes(bytes(SIZE)),
    "sync:{}": lambda path: path.write_bytes(bytes(SIZE)),
    "ram:256K": lambda _: None,
    "qcow2:{}": lambda path: path.write_bytes(qcow_images.qcow2(SIZE, cluster_bits=9)),
    "qcow:{}": lambda path: path.write_bytes(qcow_images.qcow(SIZE)),
    "vhd:{}": lambda path: path.write_bytes(vhd_images.image(SIZE, block_size=64 << 10)),
}
FILTERS = (
    "log:", "log:{}.rec", "delay:", "delay:read=20us,jitter=50us", "fault:rate=0", "throttle:iops=100000",
    "throttle:bps=2G,iops_write=50000", "cow:{}.cow,block=4K", "cow:{}.cow",
    "cache:{}.cache,size=1M", "cache:{}.cache,size=1M,mode=writethrough,block=4K",
    "checksum:{}.sums", "checksum:{}.sums,block=8K", "readahead:size=64K",
    "offset:start=4K", "offset:length=160K",
    "offset:start=8704,length=48640", "partition:1",
)  # fmt: skip


def chain_of(random: Random, directory: Path) -> str:
    """Return a random chain whose source has a table with one partition and otherwise random bytes."""
    source = random.choice(list(SOURCES))
    SOURCES[source](directory / "image")
    filters: list[str] = []
    while len(filters) < random.randint(0, 4):
        each = random.choice(FILTERS)
        if each == "partition:1" and any(other.startswith(("offset", "partition")) for other in filters):
            continue  # the table would be out of sight, or another one
        if "length=" in each and any("length=" in other for other in filters):
            continue  # the lower partition would be too short
        filters.append(each.format(directory / f"layer{len(filters)}"))
    if "partition:1" in filters:  # no layer below it moves the table
        filters = [each for each in filters if not each.startswith("offset")]
    if random.random() < 0.3 and not source.startswith("ram:"):
        places = range(len(filters) + 1)
        found = [place for place in places if not any(each.startswith(("offset", "part")) for each in filters[place:])]
        filters.insert(random.choice(found), f"luks:key={luks_images.key_file(directory / 'key')}")
    return "|".join([*filters, source.format(directory / "image")])


def fill(machine: Machine, text: str, random: Random) -> None:
    """Write the initial content to the source of a chain, without the other layers."""
    source = text.rpartition("|")[2]
    if source.startswith("ram:"):
        return
    disk = mbr(SIZE, {1: (0x83, PART // SECTOR, 100 << 10 >> 9)})
    disk[SECTOR:] = random.randbytes(SIZE - SECTOR)
    if "luks:" in text:
        disk = bytearray(luks_images.luks1(luks_images.Made(bytes(disk[:PLAIN]), stripes=7)))
    chain = machine.open(source)
    assert [0, 0] == machine.do(chain, write(0, bytes(disk)), flush())
    chain.close()


def pieces(random: Random, length: int) -> list[int]:
    """Cut a length into up to three buffers."""
    cuts = sorted({random.randrange(1, length // SECTOR) * SECTOR for _ in range(2)}) if length > SECTOR else []
    return [end - start for start, end in pairwise([0, *cuts, length])]


def batch_of(random: Random, model: bytearray, *, can_discard: bool) -> list[tuple[Request, bytes]]:
    """Return requests that do not overlap, with the bytes that reads should find. Writes are applied to the model."""
    found: list[tuple[Request, bytes]] = []
    for _ in range(random.randint(1, 8)):
        length = min(len(model), random.choice([1, 1, 8, random.randint(1, 100)]) * SECTOR)
        offset = random.randrange(0, (len(model) - length) // SECTOR + 1) * SECTOR
        if any(each.offset < offset + length and offset < each.offset + each.length for each, _ in found):
            continue
        match random.randrange(5):
            case 0 | 1:
                parts = [random.randbytes(part) for part in pieces(random, length)]
                found.append((write(offset, *parts), b""))
                model[offset : offset + length] = b"".join(parts)
            case 2 if can_discard:
                found.append((discard(offset, length), b""))
                model[offset : offset + length] = bytes(length)
            case 3:
                found.append((flush(), b""))
            case _:
                found.append((read(offset, *pieces(random, length)), bytes(model[offset : offset + length])))
    return found


def try_one(machine: Machine, random: Random, directory: Path) -> str:
    """Compare a random chain with a plain disk, and return its text."""
    text = chain_of(random, directory)
    fill(machine, text, random)
    if "partition" in text and "ram:" in text:
        return ""
    chain = machine.open(text)
    model = bytearray(machine.everything(chain))
    for _ in range(12):
        batch = batch_of(random, model, can_discard=chain.geometry.can_discard)
        assert [0] * len(batch) == machine.do(chain, *(each for each, _ in batch)), text
        for request, expected in batch:
            assert request.op != Op.READ or expected == content(request), (text, request)
    assert model == machine.everything(chain), text
    chain.close()
    if "ram:" not in text:
        assert model == machine.contents(text), text
    return text


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_chain_is_a_disk(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, group: int) -> None:
    """Whatever the layers and the source, the disk behaves as an array of bytes, also when opened again."""
    random = Random(f"{request.config.getoption('--seed')} {group}")
    tried = 0
    chains = max(100, request.config.getoption("--requests") // 100)  # `make test-images` tries 10,000
    for number in range(chains // GROUPS):
        directory = tmp_path / str(number)
        directory.mkdir()
        tried += bool(try_one(machine, random, directory))
        for each in directory.iterdir():
            each.unlink()

    assert tried > 1


@pytest.mark.parametrize(
    "layer",
    [
        "cow:{}.cow,block=4K", "cow:block=16K", "cache:{}.cache,size=1M,block=4K",
        "cache:{}.cache,size=1M,mode=writethrough,block=64K", "checksum:{}.sums", "checksum:{}.sums,block=16K",
        "readahead:size=64K", "throttle:iops=10000000,group=all",
    ],
)  # fmt: skip
def test_a_filter_at_length(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, layer: str) -> None:
    """Under any concurrent requests to a filter, the disk behaves as an array of bytes (`make test-images`: 20,000)."""
    random = Random(f"{request.config.getoption('--seed')} {layer}")
    model = bytearray(random.randbytes(SIZE))
    (tmp_path / "image").write_bytes(model)
    chain = machine.open(f"{layer.format(tmp_path / 'layer')}|aio:{tmp_path}/image")
    left = request.config.getoption("--requests") // 50
    while left > 0:
        batch = batch_of(random, model, can_discard=chain.geometry.can_discard)
        left -= len(batch)
        assert [0] * len(batch) == machine.do(chain, *(each for each, _ in batch))
        for each, expected in batch:
            assert each.op != Op.READ or expected == content(each), each
    assert model == machine.everything(chain)
    chain.close()
