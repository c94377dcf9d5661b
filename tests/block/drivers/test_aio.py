"""The driver aio."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests import places
from tests.block.drivers.test_qcow2 import contents
from tests.helpers_block import Machine, content, discard, flush, image, read, write
from tests.qcow_images import qcow2
from xenbackend.block.drivers.aio import Aio
from xenbackend.errors import DriverError


@pytest.mark.parametrize("cache", ["on", "off"])
def test_the_disk_is_the_file(machine: Machine, tmp_path: Path, cache: str) -> None:
    """What is written lands in the file at the same place, and what is in the file is read."""
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
    """Backslashes make every name of a file a name in a chain."""
    path = str(image(tmp_path / name))
    for special in "\\|,":
        path = path.replace(special, "\\" + special)
    chain = machine.open(f"delay:|aio:{path}")
    chain.close()

    assert chain.layers[1].driver.options.file == str(tmp_path / name)


def test_a_read_only_disk_offers_nothing_that_alters(machine: Machine, tmp_path: Path) -> None:
    """Read-only, the geometry says so and no discard is offered; a second reader may open the file too."""
    path = image(tmp_path / "img")
    chain, second = (machine.open(f"aio:{path}", read_only=True) for _ in range(2))
    geometry = chain.geometry
    chain.close()
    second.close()

    assert (True, False, 0) == (geometry.read_only, geometry.can_discard, geometry.discard_granularity)


def test_a_discard_does_what_the_file_said(machine: Machine, tmp_path: Path) -> None:
    """Where discard is offered, the discarded range of a file reads as zeros."""
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
    """A driver that was never opened says so, and can be closed."""
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
    """Attached read-only, its last sector ends in zeros; for writing it is refused, and left as it is."""
    with places.directory(place) as directory:
        path = directory / "odd"
        path.write_bytes(ODD)
        text = f"{driver}:{path},cache={cache}"

        assert WHOLE == contents(machine, text)
        with pytest.raises(DriverError, match=r"no multiple of its 512 byte sectors; .*: truncate -s %512 /") as caught:
            machine.open(text)
        assert (text, "file", str(path)) == (caught.value.layer, caught.value.option, caught.value.path)
        assert ODD == path.read_bytes()


def test_a_parent_that_ends_inside_a_sector(machine: Machine, tmp_path: Path) -> None:
    """A QCOW2 image over such a file reads its last sector, copies it when it writes near it, and leaves it alone."""
    (tmp_path / "odd").write_bytes(ODD)
    (tmp_path / "child").write_bytes(qcow2(len(WHOLE), backing=b"odd"))
    text = f"qcow2:{tmp_path}/child,parent_format=raw"
    assert WHOLE == contents(machine, text)
    chain = machine.open(text)
    assert [0] == machine.do(chain, write(len(WHOLE) - 1024, b"w" * 512))
    chain.close()

    assert WHOLE[:-1024] + b"w" * 512 + WHOLE[-512:] == contents(machine, text)
    assert ODD == (tmp_path / "odd").read_bytes()
