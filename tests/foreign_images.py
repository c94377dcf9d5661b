"""VDI, VMDK and VHDX images for tests, byte by byte: as their own hypervisors lay them out, or as the test says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from uuid import UUID

from xenbackend.block.formats.vhdx import crc32c
from xenbackend.units import round_up

MIB = 1 << 20
GRAIN = 64 << 10


def vdi(size: int, blocks: Mapping[int, bytes | None], *, kind: int = 1, block_size: int = MIB) -> bytes:
    """Return an image with these blocks, in this order in the file; None is one that was discarded."""
    count = -(-size // block_size)
    entries = [0xFFFFFFFF] * count
    data = b""
    for block, content in blocks.items():
        entries[block] = 0xFFFFFFFE if content is None else len(data) // block_size
        data += content or b""
    start = round_up(512 + 4 * count, 512)
    head = struct.pack("<64sIIIII256sII", b"<<< a test >>>\n", 0xBEDA107F, 0x10001, 0x180, kind, 0, b"", 512, start)
    head += struct.pack("<IIIIIQIIII", 0, 0, 0, 512, 0, size, block_size, 0, count, len(data) // block_size)
    return head.ljust(512, b"\0") + struct.pack(f"<{count}I", *entries).ljust(start - 512, b"\0") + data


def vmdk(
    size: int,
    grains: Mapping[int, bytes | None],
    *,
    compressed: bool = False,
    at_end: bool = False,
    cid: int = 0x1234,
    parent_cid: int = 0xFFFFFFFF,
    parent: str = "",
    extents: str = 'RW 1 SPARSE "image"',
) -> bytes:
    """Return an image with these grains; None is one of zeros.

    Args:
        size: bytes of the disk.
        grains: by number, in their order in the file.
        compressed: in the way of stream-optimized images.
        at_end: the place of the directory stands in a second header, at the end of the file.
        cid: the image's content ID.
        parent_cid: the parent's.
        parent: the name of its file.
        extents: what the descriptor says of the files of the disk.
    """
    text = (
        f'# Disk DescriptorFile\nCID={cid:08x}\nparentCID={parent_cid:08x}\nparentFileNameHint="{parent}"\n{extents}\n'
    )
    tables = -(-size // (512 * GRAIN))
    start = 512 + 10240 + round_up(4 * tables, 512)
    data_start = round_up(start + tables * 2048, GRAIN)
    entries, data = [0] * (tables * 512), b""
    for grain, content in grains.items():
        entries[grain] = 1 if content is None else (data_start + len(data)) // 512
        if content is not None:
            data += _packed(grain, content) if compressed else content
    flags = 7 | (3 << 16 if compressed else 0)
    directory = struct.pack(f"<{tables}I", *(start // 512 + 4 * number for number in range(tables)))

    def header(place: int) -> bytes:
        numbers = (1, flags, size // 512, GRAIN // 512, 1, 20, 512, 0, place, data_start // 512)
        packed = struct.pack("<4sIIQQQQIQQQ", b"KDMV", *numbers)
        return (packed + b"\0\n \r\n" + struct.pack("<H", int(compressed))).ljust(512, b"\0")

    image = header((1 << 64) - 1 if at_end else 21) + text.encode().ljust(10240, b"\0")
    image += directory.ljust(start - len(image), b"\0") + struct.pack(f"<{len(entries)}I", *entries)
    image = image.ljust(data_start, b"\0") + data
    return image + bytes(512) + header(21) + bytes(512) if at_end else image


def _packed(grain: int, content: bytes) -> bytes:
    packed = zlib.compress(content)
    marker = struct.pack("<QI", grain * GRAIN // 512, len(packed))
    return (marker + packed).ljust(round_up(len(packed) + 12, 512), b"\0")


def vhdx(
    size: int,
    blocks: Mapping[int, bytes | None],
    *,
    block_size: int = MIB,
    sector_size: int = 512,
    log: bytes = bytes(16),
    flags: int = 0,
    version: int = 1,
) -> bytes:
    """Return an image with these blocks, in this order in the file; None is one of zeros."""
    ratio = (sector_size << 23) // block_size
    count = -(-size // block_size)
    bat = [0] * (count + (count - 1) // ratio)
    data = b""
    for block, content in blocks.items():
        bat[block + block // ratio] = 2 if content is None else 3 * MIB + len(data) | 6
        data += content or b""
    image = b"vhdxfile".ljust(64 << 10, b"\0")
    for number in (1, 2):
        head = struct.pack(
            "<Q16s16s16sHHIQ", number, b"", b"", log if number == 2 else b"\1" * 16, 0, version, MIB, MIB
        )
        image += _summed(b"head", head, 4096).ljust(64 << 10, b"\0")
    regions = struct.pack("<II", 2, 0) + _entry("2dc27766-f623-4200-9d64-115e9bfd4a08", "<QII", MIB, MIB, 1)
    regions += _entry("8b7ca206-4790-4b9a-b8fe-575f050f886e", "<QII", 2 * MIB, MIB, 1)
    image += _summed(b"regi", regions, 64 << 10) * 2
    image = image.ljust(MIB, b"\0") + struct.pack(f"<{len(bat)}Q", *bat).ljust(MIB, b"\0")
    image += _metadata(struct.pack("<II", block_size, flags), struct.pack("<Q", size), struct.pack("<I", sector_size))
    return image.ljust(3 * MIB, b"\0") + data


def _metadata(parameters: bytes, size: bytes, sector_size: bytes) -> bytes:
    table = struct.pack("<8sHH20s", b"metadata", 0, 3, b"")
    place = 64 << 10
    names = ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
             "8141bf1d-a96f-4709-ba47-f233a8faab5f")  # fmt: skip
    for name, item in zip(names, (parameters, size, sector_size), strict=True):
        table += _entry(name, "<IIII", place, len(item), 4, 0)
        place += len(item)
    return table.ljust(64 << 10, b"\0") + parameters + size + sector_size


def _entry(guid: str, numbers: str, *values: int) -> bytes:
    return UUID(guid).bytes_le + struct.pack(numbers, *values)


def _summed(signature: bytes, rest: bytes, length: int) -> bytes:
    rest = rest.ljust(length - 8, b"\0")
    return signature + struct.pack("<I", crc32c(signature + bytes(4) + rest)) + rest
