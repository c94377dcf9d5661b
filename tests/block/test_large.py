"""Image formats at length: every size of cluster and disk, up to eight parents, compared with a raw file as a model.

`--requests` is the total number of requests for each format; `make test-images` asks for a million, and for every shape
of image (`--long`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests import qemu, vhd_images
from tests.helpers_block import Machine, content, discard, flush, read, write
from xenbackend.block.chain import Chain
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.request import Op, Request
from xenbackend.image.create import create

MIB, TIB = 1 << 20, 1 << 40
DEPTH = 8


@dataclass(frozen=True)
class Shape:
    """What sort of image: it has `depth` parents, each of which was written to before its child was made."""

    layer: str
    options: str = ""
    size: int = 64 * MIB
    depth: int = 0
    format: str = ""  # QEMU's name for the format, if it differs
    is_compressed: bool = False  # at the beginning
    cluster_size: int = 0  # only for an image that we make ourselves: QEMU makes no others than its own


SHAPES = {
    **{
        f"qcow2, {1 << bits}": Shape("qcow2", f"cluster_size={1 << bits},refcount_bits={1 << bits % 7}")
        for bits in range(9, 22)
    },
    "qcow2, version 2": Shape("qcow2", "compat=0.10"),
    "qcow2, 2 TiB": Shape("qcow2", "cluster_size=64k", size=2 * TIB),
    "qcow2, 2 TiB, large clusters": Shape("qcow2", "cluster_size=2M", size=2 * TIB),
    "qcow2, 1 TiB, small clusters": Shape("qcow2", "cluster_size=4k", size=TIB),
    "qcow2, compressed": Shape("qcow2", is_compressed=True),
    "qcow2, compressed by zstd": Shape("qcow2", "compression_type=zstd", is_compressed=True),
    "qcow2, data file": Shape("qcow2", "data_file={directory}/data{number}"),
    "qcow2, raw data file": Shape("qcow2", "data_file={directory}/data{number},data_file_raw=on"),
    "qcow2, data files, 8 parents": Shape("qcow2", "data_file={directory}/data{number}", depth=DEPTH),
    "qcow2, 8 parents": Shape("qcow2", depth=DEPTH),
    "qcow2, 2 TiB, 8 parents": Shape("qcow2", "cluster_size=128k", size=2 * TIB, depth=DEPTH),
    "qcow": Shape("qcow"),
    **{f"qcow, {1 << bits}": Shape("qcow", cluster_size=1 << bits) for bits in (9, 10, 13, 16)},
    "qcow, 64 GiB": Shape("qcow", size=64 << 30),
    "qcow, 8 parents": Shape("qcow", depth=DEPTH),
    "vhd": Shape("vhd", "force_size=on", format="vpc"),
    "vhd, 2 TiB": Shape("vhd", "force_size=on", size=2040 << 30, format="vpc"),
    **{f"vhd, {1 << bits}": Shape("vhd", format="vpc", cluster_size=1 << bits) for bits in (12, 16, 19)},
    "vhd, 8 parents": Shape("vhd", "force_size=on", depth=DEPTH, format="vpc"),
    "vhd, 2 TiB, 8 parents": Shape("vhd", "force_size=on", size=2040 << 30, depth=DEPTH, format="vpc"),
}
FAST = {  # one of each kind, without --long
    *("qcow2, 512", "qcow2, version 2", "qcow2, compressed", "qcow2, compressed by zstd", "qcow2, data file"),
    *("qcow2, 8 parents", "qcow, 1024", "vhd", "vhd, 8 parents"),
}


class Model:
    """What a disk should hold, in a raw file with holes. Requests go to a few places all over the disk."""

    def __init__(self, path: Path, size: int, chance: Random) -> None:
        self.path, self.size, self.chance = path, size, chance
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.truncate(self.fd, size)
        self.hot = [0, max(0, size - 4 * MIB), *(chance.randrange(0, size) >> 9 << 9 for _ in range(14))]

    def fill(self) -> None:
        """Write compressible data to the places that requests go to."""
        for place in self.hot:
            os.pwrite(self.fd, (self.chance.randbytes(64) * 64) * min(1024, (self.size - place) // 4096), place)

    def batch(self, can_discard: int) -> list[Request]:
        """Return requests that do not overlap. Discards cover whole clusters of `can_discard` bytes."""
        chance = self.chance
        batch: list[Request] = []
        for _ in range(chance.randint(8, 32)):
            length = chance.choice([1, 8, 8, 8, chance.randint(1, 300)]) << 9
            offset = min(chance.choice(self.hot) + (chance.randrange(4 * MIB) >> 9 << 9), self.size - length)
            kind = chance.random()
            request = read(offset, length) if kind < 0.4 else write(offset, chance.randbytes(length))
            if can_discard and kind > 0.97:
                offset = offset // can_discard * can_discard
                request = discard(offset, min(4 * can_discard, self.size - offset))
            end = request.offset + request.length
            if all(end <= each.offset or each.offset + each.length <= request.offset for each in batch):
                batch.append(request)
        return batch

    def expect(self, batch: list[Request]) -> list[bytes]:
        """Return what each read should find."""
        return [os.pread(self.fd, each.length, each.offset) if each.op == Op.READ else b"" for each in batch]

    def do(self, batch: list[Request]) -> None:
        """Apply what the disk has done."""
        for each in batch:
            if each.op == Op.WRITE:
                os.pwrite(self.fd, content(each), each.offset)
            elif each.op == Op.DISCARD:
                os.pwrite(self.fd, bytes(each.length), each.offset)

    def exercise(self, machine: Machine, chain: Chain, count: int) -> None:
        """Send so many requests, and compare what they read."""
        # If an image does not have a cluster, a discard leaves its parent's data visible.
        can_discard = chain.geometry.discard_granularity if len(chain.layers) == 1 else 0
        while count > 0:
            batch = self.batch(can_discard)
            expected = self.expect(batch)
            extra = [flush()] if self.chance.random() < 0.1 else []
            assert [0] * (len(batch) + len(extra)) == machine.do(chain, *batch, *extra)
            for request, data in zip(batch, expected, strict=True):
                assert request.op != Op.READ or data == content(request), request
            self.do(batch)
            count -= len(batch)

    def compare(self, machine: Machine, text: str) -> None:
        """Compare all of the places with a chain that was opened anew."""
        chain = machine.open(text, read_only=True, checked=False)
        for start in sorted(self.hot):
            request = read(start, min(5 * MIB, self.size - start))
            assert [0] == machine.do(chain, request)
            assert os.pread(self.fd, request.length, start) == content(request), start
        chain.close()


@contextmanager
def model_of(shape: Shape, directory: Path, chance: Random) -> Iterator[Model]:
    """Return a model of a disk of zeros."""
    model = Model(directory / "raw", shape.size, chance)
    yield model
    os.close(model.fd)


def make(shape: Shape, directory: Path, number: int) -> str:
    """Make an empty image over the one with the number below, and return the text of its layer."""
    path, base = directory / f"{number}", directory / f"{number - 1}"
    more = ",parent_format=qcow" if shape.layer == "qcow" and number else ""
    if number and shape.layer == "vhd":
        names = [(b"MacX", f"file://./{number - 1}".encode())]
        parent = b"".join([f"{number - 1}".encode().ljust(16)]) if number > 1 else (directory / "0").read_bytes()[68:84]
        path.write_bytes(
            vhd_images.image(shape.size, uuid=f"{number}".encode().ljust(16), parent_uuid=parent, names=names)
        )
        return f"vhd:{path}"
    image_format = shape.format or shape.layer
    if shape.cluster_size:
        return create(shape.layer, str(path), shape.size, Wishes(shape.cluster_size)).text
    options = ("-o", shape.options.format(directory=directory, number=number)) if shape.options else ()
    if shape.is_compressed:
        qemu.qemu_img("convert", "-c", "-f", "raw", "-O", image_format, *options, directory / "raw", path)
        return f"{shape.layer}:{path}"
    parent_options = ("-b", base, "-F", image_format) if number else ()
    qemu.qemu_img("create", "-q", "-f", image_format, *options, *parent_options, path, str(shape.size))
    if "data_file=" in shape.options:
        more = f",data_file={directory}/data{number}"
    return f"{shape.layer}:{path}{more}"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_against_a_model(machine: Machine, tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    """Whatever is written to an image and to its children is read back, by us and by QEMU, and QEMU finds no fault."""
    if name not in FAST and not request.config.getoption("--long"):
        pytest.skip("as others, at greater length; --long, or make test-images")
    shape = SHAPES[name]
    machine.files.lock_timeout_s = (
        2.0  # the kernel lets go of a file that has I/O in flight a moment after its process has
    )
    alike = [each for each in SHAPES.values() if each.layer == shape.layer]
    count = request.config.getoption("--requests") // len(alike)
    with model_of(shape, tmp_path, Random(f"{request.config.getoption('--seed')} {name}")) as model:
        if shape.is_compressed:
            model.fill()
        for number in range(shape.depth + 1):
            text = make(shape, tmp_path, number)
            chain = machine.open(text, checked=False)
            model.exercise(machine, chain, count // (shape.depth + 1))
            chain.close()
        model.compare(machine, text)
        last = text.partition(":")[2].partition(",")[0]
        if shape.layer != "qcow" and (shape.layer != "vhd" or not shape.depth):  # QEMU has no differencing images
            image_format = shape.format or shape.layer
            qemu.qemu_img("compare", "-f", image_format, "-F", "raw", last, model.path)
        if shape.layer == "qcow2":
            assert [(0, 0)] * (shape.depth + 1) == [qemu.check(tmp_path / f"{each}") for each in range(shape.depth + 1)]
