"""VDI, VMDK and VHDX images for tests, byte by byte: as their own hypervisors lay them out, or as a test wants."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from uuid import UUID

from xenbackend.block.formats.crc32c import crc32c
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
        at_end: the place of the directory is in a second header, at the end of the file.
        cid: the image's content ID.
        parent_cid: the parent's.
        parent: the name of its file.
        extents: the descriptor's lines about the files of the disk.
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


def cowd(size: int, grains: Mapping[int, bytes], *, grain: int = 512) -> bytes:
    """Return a sparse extent of ESX with these grains, in this order in the file."""
    tables = -(-size // (4096 * grain))
    data_start = 2048 + round_up(4 * tables, 512) + tables * 16384
    entries, data = [0] * (tables * 4096), b""
    for number, content in grains.items():
        entries[number] = (data_start + len(data)) // 512
        data += content
    directory_at = 4
    tables_at = directory_at + round_up(4 * tables, 512) // 512
    head = struct.pack("<4sIIIIIII", b"COWD", 1, 3, size // 512, grain // 512, directory_at, tables, data_start // 512)
    image = head.ljust(2048, b"\0") + struct.pack(f"<{tables}I", *(tables_at + 32 * each for each in range(tables)))
    return image.ljust(tables_at * 512, b"\0") + struct.pack(f"<{len(entries)}I", *entries) + data


def descriptor(
    *extents: str, create_type: str = "custom", cid: int = 0x1234, parent_cid: int = 0xFFFFFFFF, parent: str = ""
) -> bytes:
    """Return the text that names the files of a VMDK disk; an extent is a line such as ``RW 8 FLAT "a" 0``."""
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid:08x}", f"parentCID={parent_cid:08x}"]
    lines += [f'createType="{create_type}"', *([f'parentFileNameHint="{parent}"'] if parent else []), *extents]
    return "\n".join([*lines, 'ddb.adapterType = "lsilogic"', ""]).encode()


def ovf(*disks: str, more: str = "", prefix: str = "") -> bytes:
    """Return the description of an appliance with these disks; `more` are attributes of each file."""
    files = "".join(f'<File ovf:href="{name}" ovf:id="f{number}" {more}/>' for number, name in enumerate(disks))
    described = "".join(f'<Disk ovf:diskId="d{number}" ovf:fileRef="f{number}"/>' for number, _ in enumerate(disks))
    return (
        f'<?xml version="1.0"?>{prefix}<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        f'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>{files}</References>'
        f"<DiskSection>{described}</DiskSection></Envelope>"
    ).encode()


def archive(files: Sequence[tuple[str, bytes]], *, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar archive of these files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def vhdx(
    size: int,
    blocks: Mapping[int, bytes | None],
    *,
    block_size: int = MIB,
    sector_size: int = 512,
    log: bytes = bytes(16),
    ring: bytes = b"",
    flags: int = 0,
    version: int = 1,
    log_version: int = 0,
    log_length: int = 0,
    physical: int = 4096,
) -> bytes:
    """Return an image with these blocks, in this order in the file; None is one of zeros.

    Args:
        size: bytes of the disk.
        blocks: by number.
        block_size: bytes.
        sector_size: bytes.
        log: the identity of its log; zeros if that is empty.
        ring: what is in the log, a multiple of a MiB, which comes last in the file.
        flags: of its parameters.
        version: of the format.
        log_version: of the log.
        log_length: bytes of the log, if the header is to say something else than the length of `ring`.
        physical: bytes of a sector of the medium, as the image says.
    """
    ratio = (sector_size << 23) // block_size
    count = -(-size // block_size)
    bat = [0] * (count + (count - 1) // ratio)
    data = b""
    for block, content in blocks.items():
        bat[block + block // ratio] = 2 if content is None else 3 * MIB + len(data) | 6
        data += content or b""
    image = b"vhdxfile".ljust(64 << 10, b"\0")
    log_at = round_up(3 * MIB + len(data), MIB)
    for number in (1, 2):
        identity = log if number == 2 else b"\1" * 16
        numbers = (log_version, version, log_length or len(ring), log_at)
        head = struct.pack("<Q16s16s16sHHIQ", number, b"", b"", identity, *numbers)
        image += _summed(b"head", head, 4096).ljust(64 << 10, b"\0")
    regions = struct.pack("<II", 2, 0) + _entry("2dc27766-f623-4200-9d64-115e9bfd4a08", "<QII", MIB, MIB, 1)
    regions += _entry("8b7ca206-4790-4b9a-b8fe-575f050f886e", "<QII", 2 * MIB, MIB, 1)
    image += _summed(b"regi", regions, 64 << 10) * 2
    image = image.ljust(MIB, b"\0") + struct.pack(f"<{len(bat)}Q", *bat).ljust(MIB, b"\0")
    image += _metadata(
        struct.pack("<II", block_size, flags), struct.pack("<Q", size), struct.pack("<I", sector_size),
        struct.pack("<I", physical), b"identity".ljust(16),
    )  # fmt: skip
    image = image.ljust(3 * MIB, b"\0") + data
    return image.ljust(log_at, b"\0") + ring if ring else image


def vhdx_entry(
    log: bytes,
    sequence: int,
    tail: int,
    changes: Sequence[tuple[int, bytes | int]],
    *,
    flushed: int = 0,
    last: int = 0,
    padding: int = 0,
) -> bytes:
    """Return an entry of the log of a VHDX image ([MS-VHDX] 2.3.1).

    Args:
        log: the log's identity.
        sequence: the entry's number.
        tail: where in the log the oldest entry is whose changes may not be in their places, in bytes.
        changes: bytes in the file, with the 4096 bytes that belong there, or how many zeros.
        flushed: bytes that the file has for certain.
        last: bytes that it needs.
        padding: sectors of 4096 bytes behind the last that means something.
    """
    head = b"".join(
        struct.pack("<4sIQQQ", b"zero", 0, what, place, sequence)
        if isinstance(what, int)
        else struct.pack("<4s4s8sQQ", b"desc", what[-4:], what[:8], place, sequence)
        for place, what in changes
    )
    sectors = b"".join(
        struct.pack("<4sI4084sI", b"data", sequence >> 32, what[8:-4], sequence & 0xFFFFFFFF)
        for _, what in changes
        if isinstance(what, bytes)
    )
    length = round_up(64 + len(head), 4096) + len(sectors) + 4096 * padding
    numbers = (length, tail, sequence, len(changes), 0, log, flushed, last)
    rest = struct.pack("<IIQII16sQQ", *numbers) + head
    return _summed(b"loge", rest.ljust(length - len(sectors) - 4096 * padding - 8, b"\0") + sectors, length)


def vhdx_ring(entries: Mapping[int, bytes], length: int = MIB) -> bytes:
    """Return a log with entries at these places; an entry may wrap to the beginning, later ones overwrite others."""
    ring = bytearray(length)
    for place, entry in entries.items():
        inside = entry[: length - place]
        ring[place : place + len(inside)] = inside
        ring[: len(entry) - len(inside)] = entry[len(inside) :]
    return bytes(ring)


def _metadata(*items: bytes) -> bytes:
    table = struct.pack("<8sHH20s", b"metadata", 0, len(items), b"")
    place = 64 << 10
    names = ("caa16737-fa36-4d43-b3b6-33f0aa44e76b", "2fa54224-cd1b-4876-b211-5dbed83bf4b8",
             "8141bf1d-a96f-4709-ba47-f233a8faab5f", "cda348c7-445d-4471-9cc9-e9885251c556",
             "beca12ab-b2e6-4523-93ef-c309e000c746")  # fmt: skip
    for name, item in zip(names, items, strict=True):
        table += _entry(name, "<IIII", place, len(item), 4, 0)
        place += len(item)
    return table.ljust(64 << 10, b"\0") + b"".join(items)


def _entry(guid: str, numbers: str, *values: int) -> bytes:
    return UUID(guid).bytes_le + struct.pack(numbers, *values)


def _summed(signature: bytes, rest: bytes, length: int) -> bytes:
    rest = rest.ljust(length - 8, b"\0")
    return signature + struct.pack("<I", crc32c(signature + bytes(4) + rest)) + rest
