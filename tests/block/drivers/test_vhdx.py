"""vhdx: what it reports, sectors of 4 KiB, and logs that were not replayed. test_vdi.py tests other reading."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests import qemu
from tests.foreign_images import MIB, vhdx, vhdx_entry, vhdx_ring
from tests.helpers_block import Machine, content, read
from tests.image.test_extents import extents
from tests.qcow_images import qcow2
from xenbackend.errors import DriverError

pytestmark = pytest.mark.usefixtures("parents_anywhere")


def test_large_sectors(machine: Machine, tmp_path: Path) -> None:
    """A disk with sectors of 4 KiB says so, and is read by such sectors."""
    (tmp_path / "a").write_bytes(vhdx(4 * MIB, {3: b"d" * MIB}, sector_size=4096))
    chain = machine.open(f"vhdx:{tmp_path}/a", read_only=True)
    request = read(3 * MIB - 4096, 8192)
    assert [0] == machine.do(chain, request)
    chain.close()

    assert (4 * MIB, 4096) == (chain.geometry.size, chain.geometry.sector_size)
    assert bytes(4096) + b"d" * 4096 == content(request)


@pytest.mark.parametrize(("sector", "says", "physical"), [(512, 4096, 4096), (512, 512, 512), (4096, 4096, 4096),
                                                          (512, 3, 512), (4096, 512, 4096)])  # fmt: skip
def test_physical_sectors(machine: Machine, tmp_path: Path, sector: int, says: int, physical: int) -> None:
    """The guest gets the physical sector size that Hyper-V would report. An impossible one is ignored."""
    (tmp_path / "a").write_bytes(vhdx(4 * MIB, {}, sector_size=sector, physical=says))
    chain = machine.open(f"log:|vhdx:{tmp_path}/a", read_only=True)
    chain.close()

    assert [physical] * 2 == [layer.geometry.physical_sector_size for layer in chain.layers]


LOG = b"identity of log1"


def dirty(kind: str) -> bytes:
    """Return an image of 4 MiB that was not closed: block 1 is in its table, and the others only in its log."""
    table = {0: 3 * MIB | 6, 1: 4 * MIB | 6, 3: 7 * MIB | 6}
    sector = b"".join(struct.pack("<Q", table.get(block, 0)) for block in range(512))
    place = {"plain": 0, "an old round": 65536}[kind]
    changes = [(5 * MIB + 4096, b"in a block".ljust(4096, b"!")), (3 * MIB, 8192)]
    last = 8 * MIB - 4096  # QEMU 7.2 makes the file longer only where this is no MiB
    entries = {
        place: vhdx_entry(LOG, 7, place, changes, last=7 * MIB),
        place + 8192: vhdx_entry(LOG, 8, place, [(MIB, sector)], flushed=5 * MIB, last=last),
    }
    if kind == "an old round":
        entries |= {0: vhdx_entry(LOG, 3, 0, [(MIB, bytes(4096))]), 32768: vhdx_entry(b"another identity", 9, 0, [])}
    blocks = {1: b"a" * MIB, 0: b"b" * MIB, 2: b"c" * MIB}
    image = bytearray(vhdx(4 * MIB, blocks, log=LOG, ring=vhdx_ring(entries)))
    image[MIB : MIB + 4096] = bytes(8) + struct.pack("<Q", 3 * MIB | 6) + bytes(4080)
    return bytes(image)


@pytest.mark.parametrize("kind", ["plain", "an old round"])
def test_a_log_is_replayed(machine: Machine, tmp_path: Path, kind: str) -> None:
    """An image that was not closed reads as in QEMU after a replay of the log, and is not changed.

    Not where the log goes on at its beginning: QEMU 7.2 replays what it finds there, and not what came before.
    """
    path, other, raw = tmp_path / "a", tmp_path / "b", tmp_path / "raw"
    data = dirty(kind)
    path.write_bytes(data)
    other.write_bytes(data)
    qemu.qemu_img("check", "-r", "all", other)
    qemu.qemu_img("convert", "-O", "raw", other, raw)
    child = tmp_path / "child"
    child.write_bytes(qcow2(4 * MIB, backing=b"a"))

    assert raw.read_bytes() == machine.contents(f"vhdx:{path}")
    assert raw.read_bytes() == machine.contents(f"qcow2:{child},parent_format=vhdx")
    assert data == path.read_bytes()


@pytest.mark.parametrize("kind", ["plain", "an old round"])
def test_the_map_of_a_log(tmp_path: Path, kind: str) -> None:
    """The map of a disk takes the log into account."""
    path, other = tmp_path / "a", tmp_path / "b"
    for each in (path, other):
        each.write_bytes(dirty(kind))
    qemu.qemu_img("check", "-r", "all", other)

    found, replayed = (
        [(each.start, each.length, each.kind) for each in extents(f"vhdx:{each}")] for each in (path, other)
    )
    assert 2 == len({kind for _, _, kind in found})
    assert replayed == found


def test_what_a_log_says(machine: Machine, tmp_path: Path) -> None:
    """`check` shows how much of the disk is in the log. It shows nothing for an image that was closed."""
    (tmp_path / "a").write_bytes(dirty("plain"))
    (tmp_path / "b").write_bytes(vhdx(4 * MIB, {}))
    says = []
    for name in "ab":
        chain = machine.open(f"vhdx:{tmp_path}/{name}", read_only=True)
        says.append(chain.layers[0].driver.env.facts.get("log"))
        chain.close()

    assert ["not empty; ranges of the file replayed in memory: 3", None] == says


def test_a_log_that_cannot_be_right(machine: Machine, tmp_path: Path) -> None:
    """An image whose header says that its log is in use is refused if the log holds nothing."""
    (tmp_path / "a").write_bytes(vhdx(4 * MIB, {}, log=LOG, ring=bytes(MIB)))
    with pytest.raises(DriverError, match=r"it is damaged: .* but has no complete entry"):
        machine.open(f"vhdx:{tmp_path}/a", read_only=True)
