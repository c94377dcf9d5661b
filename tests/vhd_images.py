"""VHD images for tests, byte by byte: as blktap lays them out, or as the test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xenbackend.block.formats import vhd
from xenbackend.block.formats.vhd import Footer, Header, Locator, geometry_of, pack_footer, pack_header
from xenbackend.block.formats.vhd_tables import UNUSED, pack_bitmap, pack_entries
from xenbackend.units import SECTOR, round_up

UUID = bytes(range(1, 17))


def fixed(content: bytes, *, uuid: bytes = UUID, creator: bytes = b"tap\0") -> bytes:
    """Return a fixed image."""
    size = len(content)
    return content + pack_footer(Footer(vhd.FIXED, size, size, geometry_of(size), uuid, creator=creator))


def image(
    size: int,
    blocks: Mapping[int, Mapping[int, bytes]] | None = None,
    *,
    block_size: int = 2 << 20,
    uuid: bytes = UUID,
    parent_uuid: bytes | None = None,
    parent_timestamp: int = 0,
    names: Sequence[tuple[bytes, bytes]] = (),
    creator: bytes = b"tap\0",
    full: Sequence[int] | None = None,
) -> bytes:
    """Return a dynamic image, or with `parent_uuid` a differencing one.

    Args:
        size: bytes of the disk.
        blocks: by block, by sector in it: 512 bytes.
        block_size: bytes.
        uuid: the image's.
        parent_uuid: the parent's.
        parent_timestamp: the parent's, in seconds since 2000.
        names: of the parent: code and what is written there.
        creator: 4 bytes.
        full: with a batmap, in which these blocks are full.
    """
    blocks = blocks or {}
    count = -(-size // block_size)
    bitmap = round_up(block_size // SECTOR // 8, SECTOR)
    place = 1536 + round_up(4 * count, SECTOR)
    batmap = b""
    if full is not None:
        batmap = _batmap(size, full, place)
        place += len(batmap)
    locators, written = [], b""
    for code, name in names:
        padded = name.ljust(round_up(len(name), SECTOR), b"\0")
        locators.append(Locator(code, len(padded), len(name), place + len(written)))
        written += padded
    place += len(written)
    entries, data = [UNUSED] * count, b""
    for block, sectors in blocks.items():
        entries[block] = (place + len(data)) // SECTOR
        present = bytes(sector in sectors for sector in range(block_size // SECTOR))
        data += pack_bitmap(present, bitmap)
        data += b"".join(sectors.get(sector, bytes(SECTOR)) for sector in range(block_size // SECTOR))
    kind = vhd.DYNAMIC if parent_uuid is None else vhd.DIFFERENCING
    shape = geometry_of(size)
    footer = Footer(kind, size, size, shape, uuid, SECTOR, creator=creator, creator_version=0x00010003)
    parent = (parent_uuid or bytes(16), parent_timestamp, "base.vhd".encode("utf-16-be") if names else b"")
    header = Header(1536, count, block_size, *parent, tuple(locators))
    table = pack_entries(entries).ljust(round_up(4 * count, SECTOR), b"\xff")
    end = pack_footer(footer)
    return end + pack_header(header) + table + batmap + written + data + end


def _batmap(size: int, full: Sequence[int], place: int) -> bytes:
    length = max(SECTOR, round_up(size >> 24, SECTOR))
    bits = pack_bitmap(bytes(block in full for block in range(8 * length)), length)
    total = ~sum(bits) & 0xFFFFFFFF
    header = b"tdbatmap" + (place + SECTOR).to_bytes(8, "big") + (length // SECTOR).to_bytes(4, "big")
    return (header + 0x00010002.to_bytes(4, "big") + total.to_bytes(4, "big")).ljust(SECTOR, b"\0") + bits
