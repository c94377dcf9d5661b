"""New encrypted volumes: the bytes of a LUKS2 header with one key slot, as cryptsetup writes and accepts it.

Must not see a passphrase, nor derive a key from one.

Source: "LUKS2 On-Disk Format Specification" 1.1.4.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from typing import Any

from xenbackend.block.formats.blank import Blank
from xenbackend.block.formats.luks2 import BINARY, CHECKSUM_AT, HEADER, SECOND_MAGIC, VERSION
from xenbackend.block.formats.luks_volume import MAGIC, MAX_STRIPES, Cipher
from xenbackend.block.keys import ARGON2, Derivation
from xenbackend.block.luks.cipher import Sectors, address_of
from xenbackend.block.luks.unlock import diffused, wipe, xor
from xenbackend.errors import ConfigError
from xenbackend.units import round_up

DATA_AT = 16 << 20  # byte at which the data begin, as cryptsetup chooses it, with room for more key slots before it
SECTOR_SIZES = (512, 4096)
_CIPHER = Cipher("aes-xts-plain64", 64)
_COPY = 16 << 10  # bytes of each copy of the header
_SLOTS_AT = 2 * _COPY
_HASH, _DIGEST_ITERATIONS = "sha256", 100_000


def derivation() -> Derivation:
    """Return the derivation for a new slot, with a new salt: stronger than RFC 9106 recommends if memory is short."""
    return Derivation("argon2id", os.urandom(32), _CIPHER.key_size, 4, memory_kib=256 << 10, lanes=4)


def check_size(size: int, sector_size: int) -> None:
    """Check the size of an encrypted disk, in bytes. Raises: ConfigError."""
    if size <= 0 or size % sector_size:
        raise ConfigError(f"an encrypted disk of {size} bytes is not possible; choose a multiple of {sector_size}")


def blank_volume(size: int, how: Derivation, slot_key: bytearray, sector_size: int = SECTOR_SIZES[-1]) -> Blank:
    """Return an image with an encrypted disk of `size` bytes and a new random key; the disk reads as noise.

    `slot_key` was derived from the passphrase by `how`. Raises: ConfigError, DriverError.
    """
    check_size(size, sector_size)
    key = bytearray(os.urandom(_CIPHER.key_size))
    try:
        stripes = _split(key)
        length = round_up(len(stripes), BINARY)
        sectors = Sectors(_CIPHER, slot_key)
        sectors.encrypt(address_of(stripes), len(stripes), 0)
        sectors.close()
        salt = os.urandom(32)
        digest = hashlib.pbkdf2_hmac(_HASH, key, salt, _DIGEST_ITERATIONS)
    finally:
        wipe(key)
    text = json.dumps(_metadata(how, length, salt, digest, sector_size)).encode()
    name = str(uuid.uuid4()).encode()
    copies = [_copy(text, place, name) for place in (0, _COPY)]
    return Blank(DATA_AT + size, [(0, copies[0]), (_COPY, copies[1]), (_SLOTS_AT, bytes(stripes))])


def _split(key: bytearray) -> bytearray:
    """Return a key split into stripes (anti-forensic splitter), all needed to recover it; together whole sectors."""
    mixed, stripes = bytes(len(key)), bytearray()
    for _ in range(MAX_STRIPES - 1):
        stripe = os.urandom(len(key))
        stripes += stripe
        mixed = diffused(xor(mixed, stripe), _HASH)
    return stripes + xor(mixed, key)


def _copy(text: bytes, place: int, name: bytes) -> bytes:
    """Return one copy of the header."""
    magic = MAGIC if place == 0 else SECOND_MAGIC
    salt = os.urandom(64)
    head = HEADER.pack(magic, VERSION, _COPY, 1, b"", _HASH.encode(), salt, name, b"", place, b"", b"")
    head = head.ljust(BINARY, b"\0")
    body = text.ljust(_COPY - BINARY, b"\0")
    checksum = hashlib.sha256(head + body).digest()
    return head[:CHECKSUM_AT] + checksum + head[CHECKSUM_AT + len(checksum) :] + body


def _metadata(how: Derivation, length: int, salt: bytes, digest: bytes, sector_size: int) -> dict[str, Any]:
    """Return the JSON area. Numbers that may need more than 53 bits are strings, as the format demands."""
    assert how.function in ARGON2  # noqa: S101 - from `derivation`
    kdf = {
        "type": how.function, "time": how.iterations, "memory": how.memory_kib, "cpus": how.lanes,
        "salt": _base64(how.salt),
    }  # fmt: skip
    slot = {
        "type": "luks2",
        "key_size": _CIPHER.key_size,
        "af": {"type": "luks1", "stripes": MAX_STRIPES, "hash": _HASH},
        "area": {
            "type": "raw", "offset": str(_SLOTS_AT), "size": str(length),
            "encryption": _CIPHER.text, "key_size": _CIPHER.key_size,
        },
        "kdf": kdf,
    }  # fmt: skip
    segment = {
        "type": "crypt", "offset": str(DATA_AT), "size": "dynamic", "iv_tweak": "0",
        "encryption": _CIPHER.text, "sector_size": sector_size,
    }  # fmt: skip
    proof = {
        "type": "pbkdf2", "keyslots": ["0"], "segments": ["0"], "hash": _HASH, "iterations": _DIGEST_ITERATIONS,
        "salt": _base64(salt), "digest": _base64(digest),
    }  # fmt: skip
    return {
        "keyslots": {"0": slot},
        "tokens": {},
        "segments": {"0": segment},
        "digests": {"0": proof},
        "config": {"json_size": str(_COPY - BINARY), "keyslots_size": str(DATA_AT - _SLOTS_AT)},
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
