"""The header of LUKS1: bytes to values.

Must not decrypt anything, nor take a number from a header without checking it.

Source: "LUKS On-Disk Format Specification" 1.2.3; numbers are big-endian, places are in sectors of 512 bytes.
"""

from __future__ import annotations

import struct

from xenbackend.block.formats.luks_volume import Cipher, Digest, Slot, Volume, damaged
from xenbackend.block.keys import PBKDF2, Derivation
from xenbackend.units import SECTOR

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_SLOTS = 8
SIZE = _HEADER.size + _SLOTS * _SLOT.size  # bytes
VERSION = 1
_ACTIVE, _INACTIVE = 0x00AC71F3, 0x0000DEAD


def parse(data: bytes) -> Volume:
    """Parse data that begin like a LUKS1 header; the caller checks the values. Raises: DriverError."""
    _, _, name, mode, spec, payload, key_size, digest, salt, iterations, _ = _HEADER.unpack_from(data)
    cipher = Cipher(f"{_text(name)}-{_text(mode)}", key_size)
    hash_name = _text(spec)
    slots = []
    for number in range(_SLOTS):
        state, rounds, slot_salt, place, stripes = _SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size)
        if state == _INACTIVE:
            continue
        if state != _ACTIVE:
            raise damaged(f"key slot {number} is neither active nor inactive")
        derivation = Derivation(PBKDF2, slot_salt, key_size, rounds, hash_name)
        slots.append(Slot(number, derivation, cipher, place * SECTOR, hash_name, stripes))
    return Volume(VERSION, cipher, payload * SECTOR, 0, Digest(hash_name, iterations, salt, digest), tuple(slots))


def _text(field: bytes) -> str:
    text, _, _ = field.partition(b"\0")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise damaged("the name of a cipher or hash is not ASCII text") from None
