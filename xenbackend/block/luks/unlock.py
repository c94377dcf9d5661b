"""Recovers a volume's key: decrypts the stripes of a key slot by a key derived from the passphrase, and merges them.

Must not see a passphrase, nor leave any other key than the volume's in memory.

Source: "LUKS On-Disk Format Specification" 1.2.3, 2.4 (anti-forensic splitter) and 4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from xenbackend.block.driver import Look
from xenbackend.block.formats.luks_volume import Slot, Volume
from xenbackend.block.keys import Derivation
from xenbackend.block.luks.cipher import Sectors, address_of
from xenbackend.units import SECTOR, round_up

Derive = Callable[[Derivation], memoryview]  # returns a key, which the caller wipes. Raises: DriverError, OSError
_PAGE = 4096  # bytes: whole sectors of any disk


def find_key(volume: Volume, look: Look, derive: Derive, size: int) -> tuple[int, bytearray] | None:
    """Return the number of the first slot that the passphrase opens, and the volume's key; None if it opens none.

    Args:
        volume: from `formats.luks`.
        look: reads the disk.
        derive: derives a key from the passphrase.
        size: bytes of the disk.

    Raises: DriverError, OSError, including those of `derive`.
    """
    for slot in volume.slots:
        stripes = _read(look, slot.offset, slot.length(volume.cipher.key_size), size)
        key = derive(slot.derivation)
        try:
            found = _open_slot(volume, slot, key, stripes)
        finally:
            wipe(key)
            key.release()
        if volume.digest.fits(found):
            return slot.number, found
        wipe(found)
    return None


def wipe(memory: memoryview | bytearray) -> None:
    """Overwrite a key."""
    memory[:] = bytes(len(memory))


def _read(look: Look, offset: int, length: int, size: int) -> bytearray:
    """Return bytes of the disk, rounded up to whole sectors of 512 bytes; it reads whole pages."""
    start = offset // _PAGE * _PAGE
    end = min(round_up(offset + length, _PAGE), size)
    data = look(start, end - start)
    return bytearray(data[offset - start :][: round_up(length, SECTOR)])


def _open_slot(volume: Volume, slot: Slot, key: memoryview, stripes: bytearray) -> bytearray:
    sectors = Sectors(slot.cipher, key)
    try:
        sectors.decrypt(address_of(stripes), len(stripes), 0)
    finally:
        sectors.close()
    found = merge(stripes, volume.cipher.key_size, slot.stripes, slot.hash)
    wipe(stripes)
    return found


def merge(stripes: bytearray, size: int, count: int, name: str) -> bytearray:
    """Merge `count` stripes of `size` bytes, split with the hash called `name`, and return the key."""
    joined = bytes(size)
    for start in range(0, (count - 1) * size, size):
        joined = diffused(xor(joined, stripes[start : start + size]), name)
    return bytearray(xor(joined, stripes[(count - 1) * size : count * size]))


def xor(one: bytes, other: bytes | bytearray) -> bytes:
    """Return the exclusive or of two byte strings of equal length."""
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def diffused(data: bytes, name: str) -> bytes:
    """Return a stripe after diffusion: each piece of the digest's size is replaced by its hash, called `name`."""
    step = hashlib.new(name).digest_size
    pieces = [
        hashlib.new(name, number.to_bytes(4, "big") + data[start : start + step]).digest()
        for number, start in enumerate(range(0, len(data), step))
    ]
    return b"".join(pieces)[: len(data)]
