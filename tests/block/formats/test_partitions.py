"""Partition tables: compared with sfdisk and with the kernel, and damaged in many ways."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest

from tests import loops
from tests.partition_tables import gpt, mbr, record, write_header
from xenbackend.block.formats.partitions import Partition, find
from xenbackend.errors import DriverError

SIZE = 64 << 20
SMALL = 12 << 20
TABLES = {
    "gpt": "label: gpt\nsize=1M\nstart=8M, size=512\nsize=3M, type=U\n",
    "gpt with gaps": "label: gpt\n1: size=1M\n5: size=2M\n100: size=512K\n",
    "gpt of 12 entries": "label: gpt\ntable-length: 12\nsize=1M\nsize=2M\n",
    "dos": "label: dos\nsize=1M\nsize=2M, bootable\nsize=3M, type=7\n",
    "dos with logical ones": "label: dos\nsize=1M\nstart=8M, size=40M, type=E\nsize=2M\n"
    "start=9M, size=1M\nstart=12M, size=4M\nstart=20M, size=512K\nstart=30M,size=3M\n",
    "dos, extended first": "label: dos\nsize=30M, type=f\nsize=1M\n5: size=4M\n6: size=5M\n",
}


def of(disk: bytes | bytearray, number: int, sector: int = 512) -> Partition:
    """Return a partition of a disk in memory."""
    return find(lambda offset, length: bytes(disk[offset : offset + length]), len(disk), sector, number)


def all_of(disk: bytes | bytearray, sector: int = 512) -> dict[int, tuple[int, int]]:
    """Return start and length of every partition up to the 130th."""
    found = {}
    for number in range(1, 131):
        try:
            each = of(disk, number, sector)
        except DriverError:
            continue
        found[number] = (each.start, each.length)
    return found


def made(path: Path, script: str, device: str = "") -> None:
    """Let sfdisk write a table."""
    if not shutil.which("sfdisk"):
        pytest.skip("sfdisk is not installed (Debian: fdisk)")
    subprocess.run(["sfdisk", "--quiet", device or path], input=script, text=True, check=True, capture_output=True)


@pytest.mark.parametrize("table", TABLES)
def test_sfdisk_and_we_find_the_same(tmp_path: Path, table: str) -> None:
    """For each table that sfdisk writes, we find the same partitions by number, start and length, not extended ones."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    made(path, TABLES[table])
    told = json.loads(subprocess.run(["sfdisk", "-J", path], capture_output=True, check=True).stdout)["partitiontable"]
    theirs = {
        int(each["node"].removeprefix(str(path))): (each["start"] * 512, each["size"] * 512)
        for each in told["partitions"]
        if each["type"] not in ("5", "f")
    }

    assert len(theirs) > 1
    assert theirs == all_of(path.read_bytes())


@pytest.mark.parametrize("table", TABLES)
def test_nbdkit_and_we_show_the_same_bytes(tmp_path: Path, table: str) -> None:
    """For the first and last partition of each table, nbdkit's filter shows the same bytes as we do."""
    if not (shutil.which("nbdkit") and shutil.which("qemu-img")):
        pytest.skip("nbdkit or qemu-img is not installed")
    path, shown = tmp_path / "disk", tmp_path / "shown"
    path.write_bytes(Random(1).randbytes(1 << 20) * (SIZE >> 20))
    with path.open("r+b") as file:
        file.write(bytes(1 << 20))
        for place in range(1 << 20, SIZE, 1 << 20):  # each MiB holds its own offset, and no former table is left
            os.pwrite(file.fileno(), place.to_bytes(8, "big") + bytes(4088), place)
    made(path, TABLES[table])
    disk = path.read_bytes()
    numbers = sorted(all_of(disk))
    for number in (numbers[0], numbers[-1]):
        start, length = all_of(disk)[number]
        copy = f"qemu-img convert -f raw -O raw $uri {shown}"
        command = ["nbdkit", "-r", "-U", "-", "--filter=partition", "file", path, f"partition={number}", "--run", copy]
        subprocess.run(command, check=True, capture_output=True)
        assert disk[start : start + length] == shown.read_bytes()


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("table", TABLES)
def test_the_kernel_and_we_find_the_same(tmp_path: Path, table: str, sector: int) -> None:
    """The kernel finds the same partitions on a loop device, also with sectors of 4096 bytes, in which tables count."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with loops.over(path, f"--sector-size={sector}") as device:
        made(path, TABLES[table].replace("size=512\n", "size=4M\n"), device)
    theirs = {}
    with loops.over(path, f"--sector-size={sector}", "--partscan") as device:
        name = device.removeprefix("/dev/")
        for each in Path("/sys/block", name).glob(f"{name}p*"):
            start, size = (int((each / word).read_text()) * 512 for word in ("start", "size"))
            theirs[int((each / "partition").read_text())] = (start, size)
    ours = all_of(path.read_bytes(), sector)
    if not theirs:
        pytest.skip("this kernel reads no partition tables, or none of loop devices")

    extended = {number for number, (_, size) in theirs.items() if size <= 2 * sector}  # msdos.c: two sectors of it
    assert ours == {number: each for number, each in theirs.items() if number not in extended}


def test_a_damaged_gpt_is_read_by_its_other_header() -> None:
    """If a bit of the first header or its entries has flipped, the second header is used and a fact says so. If both
    are damaged, the disk is refused.
    """
    whole = gpt(SMALL, {1: (2048, 4095), 3: (8192, 8192)})
    chance = Random(1)
    assert ("", 1 << 20) == (of(whole, 1).trouble, of(whole, 1).start)
    for byte in [*range(512, 512 + 92), *(chance.randrange(1024, 1024 + 128 * 128) for _ in range(40))]:
        disk = bytearray(whole)
        disk[byte] ^= 1 << chance.randrange(8)
        found = of(disk, 3)
        assert (8192 * 512, 512) == (found.start, found.length)
        assert "the one at the end of the disk is used" in found.trouble, byte
        disk[-512 + 100 % 92] ^= 1
        with pytest.raises(DriverError, match="both headers of the GPT are damaged"):
            of(disk, 3)


def test_a_second_header_that_is_wrong_is_told() -> None:
    """If the disk has grown or its end was overwritten, the first header is used, and a fact says what is wrong."""
    whole = gpt(SMALL, {1: (2048, 4095)})

    assert "is not at the end of the disk" in of(whole + bytes(1 << 20), 1).trouble
    assert "the second header is not there" in of(whole[:-512] + bytes(512), 1).trouble


@pytest.mark.parametrize(
    ("partitions", "number", "problem"),
    [
        ({1: (2048, 4095)}, 2, "there is no partition 2; the GPT has 1$"),
        ({1: (2048, 4095)}, 129, "there is no partition 129: the GPT has room for 128"),
        ({1: (4096, 4095)}, 1, "has sectors 4096 to 4095"),
        ({1: (1, 4095)}, 1, "but the GPT allows only 34 to"),
        ({1: (2048, SMALL // 512 - 1)}, 1, "but the GPT allows only 34 to"),
        ({1: (2048, 1 << 62)}, 1, "but the GPT allows only 34 to"),
    ],
)
def test_what_a_gpt_cannot_have(partitions: dict[int, tuple[int, int]], number: int, problem: str) -> None:
    """A partition that does not exist, or is outside of the usable sectors, is refused; the error has the numbers."""
    with pytest.raises(DriverError, match=problem):
        of(gpt(SMALL, partitions), number)


def test_a_header_with_right_checksums_may_still_lie() -> None:
    """Usable sectors beyond the disk, or a header that claims another sector, are damage despite correct checksums."""
    disk = gpt(SMALL, {1: (2048, 4095)})
    last = SMALL // 512 - 1
    write_header(disk, 512, 1, last, 2, 34, last + 1)
    assert "allows sectors 34 to" in of(disk, 1).trouble
    write_header(disk, 512, 1, last, last - 1, 34, last - 33)
    assert "impossible array" in of(disk, 1).trouble
    disk[512:1024] = disk[-512:]
    assert f"the first header says that it belongs to sector {last};" in of(disk, 1).trouble


def test_a_disk_without_room_for_a_gpt() -> None:
    """If a disk of one sector claims to have a GPT, there is no room for either header, and the error says so."""
    outside = "the first lies outside of the disk, the one at the end lies outside of the disk"
    with pytest.raises(DriverError, match=outside):
        of(record({1: (0xEE, 1, 1)}), 1)


def test_logical_partitions_count_as_the_kernel_counts() -> None:
    """Logical partitions count from 5, in the order of the records. Empty and false third entries get no number."""
    disk = mbr(SMALL, {1: (0x83, 63, 100), 2: (0x05, 2048, 20000)}, {
        2048: {1: (0x83, 1, 10), 2: (0x05, 1000, 500), 3: (0x83, 30000, 1 << 20)},
        3048: {2: (0x05, 2000, 500)},
        4048: {1: (0x83, 2, 30)},
    })  # fmt: skip

    assert {1: (63 * 512, 51200), 5: (2049 * 512, 5120), 6: (4050 * 512, 15360)} == all_of(disk)


@pytest.mark.parametrize("further", [0, 1000, 1 << 30])
def test_records_in_a_circle_end(further: int) -> None:
    """A chain of extended records that leads back to itself or out of the disk is followed only to a limit."""
    entries = {1: (0x83, 1, 10), 2: (0x05, further, 500)}
    disk = mbr(SMALL, {1: (0x05, 2048, 20000)}, {2048: entries, 3048: {2: (0x05, 0, 500)}})

    assert of(disk, 5).start == 2049 * 512
    with pytest.raises(DriverError, match="there is no partition 9999"):
        of(disk, 9999)


@pytest.mark.parametrize(
    ("disk", "number", "problem"),
    [
        (bytes(SMALL), 1, "there is no partition table"),
        (record({}).ljust(SMALL, b"\0"), 1, "there is no partition 1; the MBR has none"),
        (mbr(SMALL, {1: (0x83, 2048, 10)}), 5, "the MBR has no extended one, and 1$"),
        (mbr(SMALL, {1: (0x05, 2048, 2000)}), 5, "there are no logical ones"),
        (mbr(SMALL, {1: (0x05, 2048, 2000)}), 1, "partition 1 is the extended one"),
        (mbr(SMALL, {1: (0x83, 2048, 1 << 20)}), 1, "ends at byte 537919488, but the disk at 12582912"),
        (mbr(SMALL, {1: (0x83, 2048, 10)})[:446] + b"\x7f" + bytes(63) + b"\x55\xaa" + bytes(SMALL - 512), 1,
         "there is no partition table"),
    ],
)  # fmt: skip
def test_what_an_mbr_cannot_have(disk: bytes, number: int, problem: str) -> None:
    """Each reason why an MBR has no such partition has a message of its own."""
    with pytest.raises(DriverError, match=problem):
        of(disk, number)


def test_any_bytes_end_in_a_partition_or_a_sentence() -> None:
    """Whatever the tables hold, a partition that is found lies on the disk. Otherwise the error says why not."""
    chance = Random(3)
    wholes = [
        gpt(1 << 20, {1: (64, 100), 2: (200, 300)}),
        mbr(1 << 20, {1: (0x83, 2, 9), 2: (5, 100, 900)}, {100: {1: (0x83, 1, 9), 2: (5, 50, 9)}}),
    ]
    for _ in range(3000):
        disk = bytearray(chance.choice(wholes))
        for _ in range(chance.randint(1, 6)):
            place = chance.choice([chance.randrange(440, 604), chance.randrange(1024, 1200), 100 * 512 + 446 +
                                   chance.randrange(64)])  # fmt: skip
            disk[place] = chance.choice([0, 1, 5, 0xEE, 0xFF, chance.randrange(256)])
        try:
            found = of(disk, chance.randint(1, 8))
        except DriverError:
            continue
        assert 0 <= found.start < found.start + found.length <= len(disk)
