"""What the headers of a file say, without opening it as a disk."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from uuid import UUID

import pytest

from tests.foreign_images import GRAIN, MIB, archive, cowd, descriptor, ovf, vdi, vhdx, vmdk
from tests.fuzzing import endure
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from tests.vhd_images import fixed, image
from xenbackend.image.headers import Headers, read_headers
from xenbackend.image.looks import name_of


def seen(data: bytes) -> Headers:
    """Return what the headers of a file say, in the format that it seems to have."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= length <= 1 << 20
        return data[offset : offset + length] if offset >= 0 else b""

    return read_headers(name_of(read, len(data)), read, len(data))


def vhdx_child() -> bytes:
    """Return a VHDX image whose header says that it has a parent."""
    data = bytearray(vhdx(4 * MIB, {}, flags=2))
    path = "..\\base.vhdx".encode("utf-16-le")
    key = "relative_path".encode("utf-16-le")
    locator = bytes(18) + struct.pack("<HIIHH", 1, 32, 32 + len(key), len(key), len(path)) + key + path
    table = 2 * MIB
    place = 1 << 17
    entry = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le + struct.pack("<IIII", place, len(locator), 4, 0)
    data[table + 10 : table + 12] = (4).to_bytes(2, "little")
    data[table + 32 + 3 * 32 : table + 32 + 4 * 32] = entry
    data[table + place : table + place + len(locator)] = locator
    return bytes(data)


def encrypted() -> bytes:
    """Return a QCOW2 image whose header says that it is encrypted by LUKS."""
    data = bytearray(qcow2(MIB))
    data[32:36] = (2).to_bytes(4, "big")
    return bytes(data)


CASES = {
    "qcow2": (qcow2(MIB, backing=b"b", backing_format=b"raw"), "QCOW2, version 3", MIB, ("b",), {}),
    "qcow2, features": (qcow2(MIB, incompatible=1 << 4 | 1 << 50), "QCOW2, version 3", MIB, (),
                        {"features": "extended L2 entries, number 50, unknown"}),
    "vhd": (fixed(bytes(4096)), "VHD, fixed", 4096, (), {}),
    "vhd, child": (image(MIB, parent_uuid=b"p" * 16, names=[(b"W2ru", ".\\b".encode("utf-16-le"))]),
                   "VHD, differencing", MIB, ("./b", "base.vhd"), {}),
    "vhdx": (vhdx(4 * MIB, {}, log=b"l" * 16), "VHDX, dynamic", 4 * MIB, (), {}),
    "vhdx, child": (vhdx_child(), "VHDX, differencing", 4 * MIB, ("..\\base.vhdx",), {}),
    "vdi, child": (vdi(MIB, {}, kind=4), "VDI, differencing", MIB, (), {}),
    "vmdk, part": (vmdk(MIB, {}, extents=""), "VMDK", MIB, (), {}),
    "vmdk, child": (vmdk(MIB, {}, parent_cid=1, parent="b"), "VMDK", MIB, ("b",), {}),
    "vmdk, descriptor": (descriptor('RW 8 FLAT "a" 0', 'RW 8 SESPARSE "b"', create_type="x"), "VMDK, x", 8192, (),
                         {"files": "a, b"}),
    "ova": (archive([("a.ovf", ovf("b")), ("b", b""), ("a.mf", b"")]), "OVA", 0, (), {"files": "b"}),
    "cowd": (cowd(MIB, {}), "VMDK extent, COWD", MIB, (), {}),
    "sesparse": (struct.pack("<QQQQ", 0xCAFEBABE, 0, 9, 8) + bytes(600), "VMDK extent, SE sparse", 4608, (), {}),
    "dmg": (bytes(512) + b"koly" + bytes(488) + struct.pack(">Q", 8) + bytes(12), "DMG", 4096, (), {}),
    "luks": (b"LUKS\xba\xbe\0\1" + bytes(96) + (2).to_bytes(4, "big") + bytes(4096), "LUKS, version 1", 3180, (), {}),
    "luks, version 2": (b"LUKS\xba\xbe\0\2" + bytes(600), "LUKS, version 2", 0, (), {}),
    "qcow2, encrypted": (encrypted(), "QCOW2, version 3", MIB, (), {"encryption": "LUKS"}),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "gzip", 0, (), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_seen(case: str) -> None:
    """Format, size, parents and special features are read even from images that drivers refuse."""
    data, title, size, parents, more = CASES[case]
    found = seen(data)

    assert (title, size, parents, more) == (found.format, found.size, found.parents, found.more)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("qed", ""), ("parallels", ""), ("qcow", ""), ("qcow2", ""), ("vdi", ""), ("vhdx", ""), ("vpc", "force_size"),
     ("vmdk", ""), ("vmdk", "subformat=twoGbMaxExtentFlat")],
)  # fmt: skip
def test_sizes_are_qemus(tmp_path: Path, image_format: str, options: str) -> None:
    """The size is that of the disk that QEMU made."""
    qemu_img("create", "-q", "-f", image_format, *(("-o", options) if options else ()), tmp_path / "x", "5M")

    assert 5 * MIB == seen((tmp_path / "x").read_bytes()).size


@pytest.mark.parametrize("image_format", ["qed", "qcow", "qcow2"])
def test_parents_are_qemus(tmp_path: Path, image_format: str) -> None:
    """The parent's name is the one that QEMU wrote."""
    qemu_img("create", "-q", "-f", image_format, "-u", "-b", "gone", "-F", "raw", tmp_path / "x", "5M")

    assert ("gone",) == seen((tmp_path / "x").read_bytes()).parents


def test_a_part_of_a_header_is_no_reason_to_fail() -> None:
    """A header that is cut short or damaged gives fewer facts, but no error."""
    for data, title, *_ in CASES.values():
        for length in (8, 70, 200, 513):
            assert isinstance(seen(data[:length]), Headers), title


@pytest.mark.slow
def test_any_bytes_are_seen_without_an_error(request: pytest.FixtureRequest) -> None:
    """R19: any bytes in headers give facts that can be printed, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    goods = [bytearray(data) for data, *_ in CASES.values()]
    goods.append(bytearray(vmdk(MIB, {1: b"v" * GRAIN})))

    def damaged() -> bytes:
        data = chance.choice(goods)
        places = [chance.randrange(8, min(len(data), 3072)) for _ in range(chance.randint(1, 8))]
        kept = [data[place] for place in places]
        for place in places:
            data[place] = chance.choice([0, 1, 0x80, 0xFF, chance.randrange(256)])
        case = bytes(data[: 3 * MIB])
        for place, byte in zip(reversed(places), reversed(kept), strict=True):
            data[place] = byte
        return case

    assert 0 == endure(request.config.getoption("--requests") // 200, damaged, seen)
