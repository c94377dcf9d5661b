"""The header of LUKS2, of which there are two copies: bytes and JSON to values.

Must not decrypt anything, nor take a number from a header without checking it: the JSON of a stranger's image
is bounded in length by its header, in depth by the interpreter, and each value is checked before it is used.

Source: "LUKS2 On-Disk Format Specification" 1.1.4; lib/luks2/luks2_disk_metadata.c of cryptsetup for the places of a
second copy if the first one is gone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from typing import Any, NamedTuple

from xenbackend.block.driver import Look
from xenbackend.block.formats.luks_volume import MAGIC, MAX_SLOTS, Cipher, Digest, Slot, Volume, damaged
from xenbackend.block.keys import ARGON2, PBKDF2, Derivation
from xenbackend.errors import DriverError, printable

SECOND_MAGIC = b"SKUL\xba\xbe"
VERSION = 2
HEADER = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
BINARY = 4096  # bytes in front of the JSON
_SIZES = tuple(1 << bits for bits in range(14, 23))  # of a copy: 16 KiB to 4 MiB
CHECKSUM_AT = 448
_SECTOR_SIZES = (512, 1024, 2048, 4096)
_MOST_DIGITS = 20  # of a number that is a string in the JSON
_PRIORITIES = {2: 0, 1: 1}  # priority to rank in the order of tries; priority 0: tried only if it is named


class _Copy(NamedTuple):
    size: int  # bytes
    sequence: int
    json: bytes


def parse(look: Look, size: int, slot: int | None = None) -> Volume:
    """Parse the newer valid one of both copies; the caller checks the values.

    `slot` may be one that is only used if it is named. Raises: DriverError, OSError.
    """
    first = _read_copy(look, 0, MAGIC, size)
    places = [first.size] if first else _SIZES
    copies = [first, *(_read_copy(look, place, SECOND_MAGIC, size) for place in places)]
    sound = [each for each in copies if each is not None]
    if not sound:
        if look(0, min(BINARY, size))[: len(MAGIC)] == MAGIC:
            raise damaged("neither copy of it has a correct checksum")
        raise DriverError("there is no LUKS header; to make one: `cryptsetup luksFormat`")
    newest = max(sound, key=lambda each: each.sequence)
    return _Metadata(newest).volume(slot)


def _read_copy(look: Look, place: int, magic: bytes, size: int) -> _Copy | None:
    """Return the copy at `place`, or None if there is no valid one."""
    if place + BINARY > size:
        return None
    head = look(place, BINARY)
    found, version, length, sequence, _, algorithm, _, _, _, offset, _, checksum = HEADER.unpack_from(head)
    if found != magic or version != VERSION or length not in _SIZES or offset != place or place + length > size:
        return None
    if algorithm.rstrip(b"\0") != b"sha256":
        return None
    data = look(place + BINARY, length - BINARY)
    blank = head[:CHECKSUM_AT] + bytes(len(checksum)) + head[CHECKSUM_AT + len(checksum) :]
    if hashlib.sha256(blank + data).digest() != checksum[:32]:
        return None
    return _Copy(length, sequence, data)


class _Metadata:
    """The JSON of a copy."""

    def __init__(self, copy: _Copy) -> None:
        text = copy.json.partition(b"\0")[0]
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged("its metadata are not JSON") from None
        self._json = _dict(found, "its metadata")
        self._copy = copy

    def volume(self, wanted: int | None) -> Volume:
        """Return the volume that it describes. Raises: DriverError."""
        self._refuse_requirements()
        name, segment = self._segment()
        cipher_text = _str(segment, "encryption")
        digest, slot_names = self._digest(name)
        sector_size = _int(segment, "sector_size")
        if sector_size not in _SECTOR_SIZES:
            raise damaged(f"its sectors have {sector_size} bytes")
        size_text = segment.get("size")
        size = 0 if size_text == "dynamic" else _number(segment, "size")
        if size_text != "dynamic" and not size:
            raise damaged("its data segment is empty")
        slots, key_size = self._slots(slot_names, wanted)
        return Volume(
            VERSION, Cipher(cipher_text, key_size), _number(segment, "offset"), size, digest, slots,
            sector_size, _number(segment, "iv_tweak"),
        )  # fmt: skip

    def _refuse_requirements(self) -> None:
        config = _dict(self._json.get("config"), "config")
        requirements = _dict(config.get("requirements", {}), "requirements").get("mandatory", [])
        if not isinstance(requirements, list):
            raise damaged("its requirements are not a list")
        if requirements:
            named = ", ".join(printable(str(each)[:40]) for each in requirements[:8])
            hint = "; `cryptsetup reencrypt` finishes a re-encryption that was begun" if "reencrypt" in named else ""
            raise DriverError(f"it requires features that this driver does not know: {named}{hint}")

    def _segment(self) -> tuple[str, dict[str, Any]]:
        segments = _dict(self._json.get("segments"), "segments")
        found = {
            name: _dict(each, f"segment {printable(name[:8])}")
            for name, each in segments.items()
            if not _is_backup(each)
        }
        if len(found) != 1:
            raise DriverError(f"its data have {len(found)} segments, and this driver supports only one")
        name, segment = next(iter(found.items()))
        kind = _str(segment, "type")
        if kind != "crypt":
            raise DriverError(
                f"its data are a segment of type {printable(kind[:40])}, and this driver supports only crypt"
            )
        if "integrity" in segment:
            raise DriverError("its sectors have tags (dm-integrity), which this driver does not support")
        return name, segment

    def _digest(self, segment: str) -> tuple[Digest, list[str]]:
        digests = _dict(self._json.get("digests"), "digests")
        found = [
            each for each in (_dict(one, "a digest") for one in digests.values()) if segment in _texts(each, "segments")
        ]
        if len(found) != 1:
            raise damaged(f"there are {len(found)} digests of its key")
        kind = _str(found[0], "type")
        if kind != PBKDF2:
            raise DriverError(
                f"the digest of its key is of type {printable(kind[:40])}, and this driver supports only pbkdf2"
            )
        digest = Digest(
            _str(found[0], "hash"), _int(found[0], "iterations"), _base64(found[0], "salt"), _base64(found[0], "digest")
        )
        return digest, _texts(found[0], "keyslots")

    def _slots(self, names: list[str], wanted: int | None) -> tuple[tuple[Slot, ...], int]:
        """Return the slots in the order in which they are tried, and the size of their key in bytes."""
        all_slots = _dict(self._json.get("keyslots"), "keyslots")
        if len(all_slots) > MAX_SLOTS:
            raise damaged(f"it has {len(all_slots)} key slots, more than {MAX_SLOTS}")
        ranked: list[tuple[int, int, Slot]] = []
        sizes = set()
        for name in names:
            slot = _dict(all_slots.get(name), f"key slot {printable(name[:8])}")
            if not name.isdecimal() or len(name) > 2:
                raise damaged(f"a key slot is called {printable(name[:20])}")
            rank = _PRIORITIES.get(_int(slot, "priority") if "priority" in slot else 1, 3)
            if _str(slot, "type") != "luks2" or (rank == 3 and int(name) != wanted):
                continue
            ranked.append((rank, int(name), _slot(int(name), slot)))
            sizes.add(_int(slot, "key_size"))
        if len(sizes) > 1:
            raise damaged("its key slots have keys of different sizes")
        return tuple(slot for _, _, slot in sorted(ranked, key=lambda each: each[:2])), sizes.pop() if sizes else 0


def _slot(number: int, slot: dict[str, Any]) -> Slot:
    area, stripes, kdf = (_dict(slot.get(name), f"{name} of a key slot") for name in ("area", "af", "kdf"))
    if _str(area, "type") != "raw" or _str(stripes, "type") != "luks1":
        raise DriverError(f"key slot {number} is stored in a way that this driver does not support")
    length = _int(area, "key_size")
    function = _str(kdf, "type")
    if function in ARGON2:
        derivation = Derivation(
            function, _base64(kdf, "salt"), length, _int(kdf, "time"),
            memory_kib=_int(kdf, "memory"), lanes=_int(kdf, "cpus"),
        )  # fmt: skip
    else:
        derivation = Derivation(
            function[:40], _base64(kdf, "salt"), length, _int(kdf, "iterations"), hash=_str(kdf, "hash")
        )
    cipher = Cipher(_str(area, "encryption"), length)
    return Slot(number, derivation, cipher, _number(area, "offset"), _str(stripes, "hash"), _int(stripes, "stripes"))


def _is_backup(segment: Any) -> bool:
    flags = segment.get("flags", []) if isinstance(segment, dict) else []
    return isinstance(flags, list) and any(isinstance(each, str) and each.startswith("backup-") for each in flags)


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise damaged(f"{what}: missing, or not a JSON object")
    return value


def _str(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise damaged(f"{name} is not a text")
    return value


def _texts(values: dict[str, Any], name: str) -> list[str]:
    value = values.get(name)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value) or len(set(value)) < len(value):
        raise damaged(f"{name} is not a list of names")
    return value


def _int(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise damaged(f"{name} is not a number")
    return value


def _number(values: dict[str, Any], name: str) -> int:
    """Return a 64-bit number, which is a string in the JSON since not all JSON parsers support such numbers."""
    value = values.get(name)
    if not isinstance(value, str) or not (value.isascii() and value.isdecimal()) or len(value) > _MOST_DIGITS:
        raise damaged(f"{name} is not a number")
    if int(value) >= 1 << 64:
        raise damaged(f"{name} is not a number")
    return int(value)


def _base64(values: dict[str, Any], name: str) -> bytes:
    text = _str(values, name)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise damaged(f"{name} is not base64") from None
