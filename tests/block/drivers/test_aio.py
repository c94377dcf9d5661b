"""The driver aio."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests import places, qemu
from tests.block.drivers.test_qcow2 import random_guest
from tests.helpers_block import Machine, content, discard, flush, image, read, write
from tests.loops import loop
from tests.qcow_images import qcow2
from xenbackend.block.drivers.aio import Aio
from xenbackend.errors import ChainError, DriverError


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_disk_is_the_file(machine: Machine, tmp_path: Path, cache: str) -> None:
    """A write reaches the file at the same offset, and a read returns what the file holds."""
    path = image(tmp_path / "img")
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"from the file".ljust(4096, b"."))
    chain = machine.open(f"aio:{path},cache={cache}")
    request = read(8192, 4096)

    assert [0, 0] == machine.do(chain, request, write(4096, b"w" * 4096))
    assert [0] == machine.do(chain, flush())
    chain.close()
    assert content(request) == b"from the file".ljust(4096, b".")
    assert path.read_bytes()[4096:8192] == b"w" * 4096


@pytest.mark.parametrize("name", ["a|b", "a,b", r"a\b", "a=b", " ", "ä\n"])
def test_any_file_name_can_be_written(machine: Machine, tmp_path: Path, name: str) -> None:
    """With backslashes, any file name can be written in a chain."""
    path = str(image(tmp_path / name))
    for special in "\\|,":
        path = path.replace(special, "\\" + special)
    chain = machine.open(f"delay:|aio:{path}")
    chain.close()

    assert chain.layers[1].driver.options.file == str(tmp_path / name)


def test_a_read_only_disk_offers_nothing_that_alters(machine: Machine, tmp_path: Path) -> None:
    """A read-only disk says so and offers no discard. A second reader can open the file at the same time."""
    path = image(tmp_path / "img")
    chain, second = (machine.open(f"aio:{path}", read_only=True) for _ in range(2))
    geometry = chain.geometry
    chain.close()
    second.close()

    assert (True, False, 0) == (geometry.read_only, geometry.can_discard, geometry.discard_granularity)


def test_a_discard_does_what_the_file_said(machine: Machine, tmp_path: Path) -> None:
    """If discard is offered, a discarded range of the file reads as zeros."""
    path = image(tmp_path / "img")
    chain = machine.open(f"aio:{path}")
    if not chain.geometry.can_discard:
        chain.close()
        pytest.skip("the file system here punches no holes")
    request = read(0, 65536)
    machine.do(chain, write(0, b"x" * 65536))

    assert [0] == machine.do(chain, discard(0, 65536))
    machine.do(chain, request)
    chain.close()
    assert bytes(65536) == content(request)


def test_a_file_that_is_not_open_takes_no_requests() -> None:
    """A driver that was never opened refuses requests with a clear error, and can be closed."""
    driver = Aio(Aio.Options("/img"))
    with pytest.raises(RuntimeError, match="before the file was open"):
        driver.submit([flush()])
    driver.close()


ODD = Random(1).randbytes(70_001)
WHOLE = ODD.ljust(70_144, b"\0")


@pytest.mark.parametrize("driver", ["aio", "sync"])
@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("place", [places.DISK, places.MEMORY], ids=str)
def test_a_file_that_ends_inside_a_sector(machine: Machine, driver: str, cache: str, place: Path) -> None:
    """A file that ends inside a sector is refused for writing. Read-only, its last sector is completed by zeros."""
    with places.directory(place) as directory:
        path = directory / "odd"
        path.write_bytes(ODD)
        text = f"{driver}:{path},cache={cache}"

        assert WHOLE == machine.contents(text)
        with pytest.raises(DriverError, match=r"a multiple of its 512 byte sectors; .*: truncate -s %512 /") as caught:
            machine.open(text)
        assert (text, "file", str(path)) == (caught.value.layer, caught.value.option, caught.value.path)
        assert ODD == path.read_bytes()


def test_a_parent_that_ends_inside_a_sector(machine: Machine, tmp_path: Path) -> None:
    """A QCOW2 image over such a file reads its last sector, copies it for a write beside it, and never writes to it."""
    (tmp_path / "odd").write_bytes(ODD)
    (tmp_path / "child").write_bytes(qcow2(len(WHOLE), backing=b"odd"))
    text = f"qcow2:{tmp_path}/child,parent_format=raw"
    assert WHOLE == machine.contents(text)
    chain = machine.open(text)
    assert [0] == machine.do(chain, write(len(WHOLE) - 1024, b"w" * 512))
    chain.close()

    assert WHOLE[:-1024] + b"w" * 512 + WHOLE[-512:] == machine.contents(text)
    assert ODD == (tmp_path / "odd").read_bytes()


@pytest.mark.parametrize("sector", ["512", "1024", "2048", "4096"])
def test_sectors_that_are_asked_for(machine: Machine, tmp_path: Path, sector: str) -> None:
    """The disk has the sector size that the chain asks for, and its physical sector is at least as large."""
    path = image(tmp_path / "img")
    chain = machine.open(f"aio:{path},sector={sector}")
    geometry = chain.geometry
    chain.close()

    assert int(sector) == geometry.sector_size
    assert geometry.physical_sector_size >= int(sector)


@pytest.mark.parametrize("sector", ["", "0", "256", "513", "8192", "4K", "-512"])
def test_sectors_that_no_disk_has(machine: Machine, tmp_path: Path, sector: str) -> None:
    """A sector size that guests do not support is refused before the file is opened; the error lists valid ones."""
    with pytest.raises(ChainError, match=r"option sector: .* is not one of medium, 512, 1024, 2048, 4096"):
        machine.open(f"aio:{tmp_path}/none,sector={sector}")


def test_a_size_that_is_no_multiple_of_the_sector(machine: Machine, tmp_path: Path) -> None:
    """A file whose size is not a multiple of the sector size that was asked for can be opened read-only."""
    path = image(tmp_path / "img", 8192 + 512)
    text = f"aio:{path},sector=4096"
    with pytest.raises(
        DriverError, match=r"8704 bytes, which is not a multiple of its 4096 byte sectors; .* -s %4096 "
    ):
        machine.open(text)

    assert bytes(12288) == machine.contents(text)


@pytest.mark.slow
def test_small_sectors_of_a_device_with_large_ones(machine: Machine, tmp_path: Path) -> None:
    """With `sector=512` on a device with larger sectors, concurrent writes of single sectors all arrive.

    There are writes of whole device sectors, flushes, and discards of less than a device sector too.
    """
    with loop(tmp_path / "disk", 1 << 20, sector_size=4096) as (device, path):
        chance = Random(2)
        path.write_bytes(model := bytearray(chance.randbytes(1 << 20)))
        chain = machine.open(f"aio:{device},sector=512")
        assert (512, 4096) == (chain.geometry.sector_size, chain.geometry.physical_sector_size)
        for _ in range(6):
            cuts = sorted(chance.sample(range(256), 120))  # adjacent ranges, most of them less than a device sector
            batch = [write(first * 512, chance.randbytes((last - first) * 512)) for first, last in pairwise(cuts)]
            batch.append(write(32768 * 8, chance.randbytes(8192)))
            chance.shuffle(batch)
            batch = [*batch[:40], flush(), discard(1000 * 512, 512), *batch[40:]]
            assert [0] * len(batch) == machine.do(chain, *batch)
            for each in batch:
                if each.iov:
                    model[each.offset : each.offset + each.length] = content(each)
        request = read(3584, 512, 1024, 130_048)
        assert [0] == machine.do(chain, request)
        chain.close()

        assert model[3584 : 3584 + request.length] == content(request)
        assert model == path.read_bytes()


@pytest.mark.slow
def test_an_image_on_a_device_with_large_sectors(machine: Machine, tmp_path: Path) -> None:
    """A QCOW2 image whose clusters are smaller than the device's sectors can be read and written."""
    small = tmp_path / "small"
    qemu.qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", small, "1M")
    with loop(tmp_path / "disk", 8 << 20, sector_size=4096) as (device, path):
        with path.open("r+b") as file:
            file.write(small.read_bytes())
        model = bytearray(1 << 20)
        random_guest(machine, f"qcow2:{device}", model, Random(4), 40)

        assert model == machine.contents(f"qcow2:{device}")
        assert (0, 0) == qemu.check(path)
