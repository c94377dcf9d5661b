"""The header of an encrypted volume, LUKS1 or LUKS2: read, decoded, and checked against the disk that it is on.

Must not decrypt anything, nor trust a number in the header.
"""

from __future__ import annotations

from dataclasses import replace

from xenbackend.block.driver import Look
from xenbackend.block.formats import luks1, luks2
from xenbackend.block.formats.luks_volume import MAGIC, Volume, damaged
from xenbackend.errors import DriverError

_PAGE = 4096  # bytes: whole sectors of any disk
_MAX_SIZE = 1 << 63


def parse(look: Look, size: int, slot: int | None = None) -> Volume:
    """Return the volume that the header of a disk describes, including its size.

    Args:
        look: reads the disk.
        size: size of the disk in bytes.
        slot: the only key slot to be tried; None: all of them.

    Raises: DriverError, OSError.
    """
    if size < _PAGE:
        raise DriverError(f"the layer below has {size} bytes, too few for a LUKS header")
    first = look(0, _PAGE)
    is_1 = first[:8] == MAGIC + luks1.VERSION.to_bytes(2, "big")
    volume = luks1.parse(first) if is_1 else luks2.parse(look, size, slot)
    if slot is not None:
        volume = replace(volume, slots=tuple(each for each in volume.slots if each.number == slot))
    _check(volume, luks1.SIZE if is_1 else luks2.BINARY, size)
    return volume if volume.size else replace(volume, size=size - volume.offset)


def _check(volume: Volume, first: int, size: int) -> None:
    """Check a volume against its disk: the slots have to be between byte `first` and the data. Raises: DriverError."""
    if not volume.offset:
        raise DriverError("its header is a detached one, whose data lie elsewhere, which this driver does not support")
    end = volume.offset + volume.size
    if volume.offset % volume.sector_size or volume.size % volume.sector_size or not first < volume.offset < _MAX_SIZE:
        raise damaged(f"its data are {volume.size} bytes from byte {volume.offset} on")
    if end > size or volume.offset >= size:
        raise DriverError(
            f"its data lie from byte {volume.offset} to {max(end, volume.offset + volume.sector_size)}, but the layer "
            f"below has only {size} bytes: it has been truncated"
        )
    if not volume.size and (size - volume.offset) % volume.sector_size:
        raise DriverError(
            f"its data are all from byte {volume.offset} on, {size - volume.offset} bytes, which is not a whole "
            f"number of its sectors of {volume.sector_size} bytes"
        )
    if not volume.slots:
        raise DriverError("none of its key slots is active, or none of those to be tried: no passphrase can open it")
    volume.cipher.check()
    volume.digest.check()
    for slot in volume.slots:
        slot.check(volume.cipher.key_size, first, volume.offset)
