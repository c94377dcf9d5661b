"""Encrypted images and sectors, made without our code: by the specification, hashlib and the program openssl.

Must not import xenbackend: the drivers are compared with what it makes. `tests/block/drivers/test_luks.py` has
cryptsetup look at it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSPHRASE = b"a secret"
DATA_1 = 4096  # bytes in front of the key slots of the images of LUKS1 here
SLOTS_2 = 0x8000  # bytes: the room of LUKS2's key slots begins behind both headers
SECTOR = 512


def aes_ecb(key: bytes, data: bytes, *, decrypt: bool = False) -> bytes:
    """Return blocks encrypted (or decrypted) by AES."""
    command = ["openssl", "enc", f"-aes-{len(key) * 8}-ecb", "-nopad", "-K", key.hex(), *(["-d"] if decrypt else [])]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def aes_cbc(key: bytes, iv: bytes, data: bytes) -> bytes:
    """Return blocks encrypted by AES in CBC mode."""
    command = ["openssl", "enc", f"-aes-{len(key) * 8}-cbc", "-nopad", "-K", key.hex(), "-iv", iv.hex()]
    return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def numbers(length: int, sector: int, first: int) -> list[int]:
    """Return the numbers of the sectors in `length` bytes, counted in units of 512 bytes."""
    return [first + place // SECTOR for place in range(0, length, sector)]


def xts(key: bytes, data: bytes, sector: int = SECTOR, first: int = 0, *, decrypt: bool = False) -> bytes:
    """Return sectors encrypted by AES-XTS with plain64 (IEEE 1619); `first` is the number of the first one."""
    half = len(key) // 2
    begins = b"".join(number.to_bytes(16, "little") for number in numbers(len(data), sector, first))
    begins = aes_ecb(key[half:], begins)
    tweaks = []
    for place in range(0, len(begins), 16):
        tweak = int.from_bytes(begins[place : place + 16], "little")
        for _ in range(sector // 16):
            tweaks.append(tweak.to_bytes(16, "little"))
            tweak = (tweak << 1) & ((1 << 128) - 1) ^ (0x87 if tweak >> 127 else 0)
    mask = b"".join(tweaks)
    return xor(aes_ecb(key[:half], xor(data, mask), decrypt=decrypt), mask)


def essiv(key: bytes, data: bytes, first: int = 0) -> bytes:
    """Return sectors of 512 bytes encrypted by aes-cbc-essiv:sha256."""
    begins = b"".join(number.to_bytes(16, "little") for number in numbers(len(data), SECTOR, first))
    chained, columns = aes_ecb(hashlib.sha256(key).digest(), begins), []
    for at in range(0, SECTOR, 16):  # of all sectors at once
        column = b"".join(data[place + at : place + at + 16] for place in range(0, len(data), SECTOR))
        chained = aes_ecb(key, xor(column, chained))
        columns.append(chained)
    return b"".join(column[place : place + 16] for place in range(0, len(columns[0]), 16) for column in columns)


def xor(one: bytes, other: bytes) -> bytes:
    """Return the exclusive or of both."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def split(key: bytes, stripes: int, name: str) -> bytes:
    """Return a key split into stripes, all of which are needed to restore it."""
    last, found = bytes(len(key)), []
    for _ in range(stripes - 1):
        stripe = os.urandom(len(key))
        found.append(stripe)
        mixed = xor(last, stripe)
        step = hashlib.new(name).digest_size
        last = b"".join(
            hashlib.new(name, struct.pack(">I", at // step) + mixed[at : at + step]).digest()
            for at in range(0, len(mixed), step)
        )[: len(key)]
    return b"".join([*found, xor(last, key)])


@dataclass
class Made:
    """A volume that is being made: `plain` is its disk."""

    plain: bytes
    passphrases: Sequence[bytes] = (PASSPHRASE,)
    key: bytes = field(default_factory=lambda: os.urandom(64))
    cipher: str = "xts-plain64"
    hash: str = "sha256"
    iterations: int = 1000
    stripes: int = 4000
    sector: int = SECTOR

    @property
    def area(self) -> int:
        """Bytes of a key slot's area; with as many stripes as cryptsetup uses, the same as there."""
        return -(-len(self.key) * self.stripes // 4096) * 4096

    def sectors(self, key: bytes, data: bytes, sector: int = SECTOR) -> bytes:
        """Return data, encrypted."""
        if self.cipher == "cbc-essiv:sha256":
            return essiv(key, data)
        return xts(key, data, sector)

    def slot(self, passphrase: bytes, salt: bytes) -> bytes:
        """Return the encrypted stripes of a key slot."""
        found = hashlib.pbkdf2_hmac(self.hash, passphrase, salt, self.iterations, len(self.key))
        stripes = split(self.key, self.stripes, self.hash)
        return self.sectors(found, stripes.ljust(-(-len(stripes) // SECTOR) * SECTOR, b"\0"))


def luks1(made: Made) -> bytes:
    """Return an image of LUKS1."""
    image = bytearray(DATA_1 + 8 * made.area)
    data_at = len(image)
    salt = os.urandom(32)
    digest = hashlib.pbkdf2_hmac(made.hash, made.key, salt, 1000, 20)
    struct.pack_into(
        ">6sH32s32s32sII20s32sI40s", image, 0, b"LUKS\xba\xbe", 1, b"aes", made.cipher.encode(), made.hash.encode(),
        data_at // SECTOR, len(made.key), digest, salt, 1000, b"5f6f2b1c-0000-4000-8000-000000000001",
    )  # fmt: skip
    for number in range(8):
        place, state, slot_salt = DATA_1 + number * made.area, 0x0000DEAD, bytes(32)
        if number < len(made.passphrases):
            state, slot_salt = 0x00AC71F3, os.urandom(32)
            stripes = made.slot(made.passphrases[number], slot_salt)
            image[place : place + len(stripes)] = stripes
        values = (state, made.iterations, slot_salt, place // SECTOR, made.stripes)
        struct.pack_into(">II32sII", image, 208 + 48 * number, *values)
    return bytes(image) + made.sectors(made.key, made.plain)


def metadata(made: Made, salts: Sequence[bytes], data_at: int) -> dict[str, Any]:
    """Return the JSON of LUKS2."""
    digest_salt = os.urandom(32)
    digest = hashlib.pbkdf2_hmac("sha256", made.key, digest_salt, 1000, 32)
    slots = {
        str(number): {
            "type": "luks2", "key_size": len(made.key),
            "af": {"type": "luks1", "stripes": made.stripes, "hash": made.hash},
            "area": {
                "type": "raw", "offset": str(SLOTS_2 + number * made.area), "size": str(made.area),
                "encryption": "aes-xts-plain64", "key_size": len(made.key),
            },
            "kdf": {"type": "pbkdf2", "hash": made.hash, "iterations": made.iterations, "salt": text(salt)},
        }
        for number, salt in enumerate(salts)
    }  # fmt: skip
    return {
        "keyslots": slots,
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt", "offset": str(data_at), "size": "dynamic", "iv_tweak": "0",
                "encryption": f"aes-{made.cipher}", "sector_size": made.sector,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2", "keyslots": list(slots), "segments": ["0"], "hash": "sha256", "iterations": 1000,
                "salt": text(digest_salt), "digest": text(digest),
            }
        },
        "config": {"json_size": str(0x4000 - 4096), "keyslots_size": str(data_at - SLOTS_2)},
    }  # fmt: skip


def text(data: bytes) -> str:
    """Return bytes in base64, as in LUKS2's JSON."""
    return base64.b64encode(data).decode()


def header2(values: Any, *, sequence: int = 3, is_second: bool = False, size: int = 0x4000) -> bytes:
    """Return one copy of the header of LUKS2."""
    body = (values if isinstance(values, bytes) else json.dumps(values).encode()).ljust(size - 4096, b"\0")
    head = struct.pack(
        ">6sHQQ48s32s64s40s48sQ184s64s", b"SKUL\xba\xbe" if is_second else b"LUKS\xba\xbe", 2, size, sequence, b"",
        b"sha256", os.urandom(64), b"5f6f2b1c-0000-4000-8000-000000000002", b"", size if is_second else 0, b"", b"",
    ).ljust(4096, b"\0")  # fmt: skip
    checksum = hashlib.sha256(head + body).digest()
    return head[:448] + checksum + head[480:] + body


def luks2(made: Made, change: dict[str, Any] | None = None) -> bytes:
    """Return an image of LUKS2; `change` replaces parts of its JSON, by dotted name."""
    data_at = -(-(SLOTS_2 + max(1, len(made.passphrases)) * made.area) // 4096) * 4096
    salts = [os.urandom(32) for _ in made.passphrases]
    values = metadata(made, salts, data_at)
    for name, value in (change or {}).items():
        *path, last = name.split(".")
        place = values
        for each in path:
            place = place[each]
        place[last] = value
    image = bytearray(data_at)
    image[:0x4000], image[0x4000:0x8000] = header2(values), header2(values, is_second=True)
    for number, (passphrase, salt) in enumerate(zip(made.passphrases, salts, strict=True)):
        stripes = made.slot(passphrase, salt)
        place = SLOTS_2 + number * made.area
        image[place : place + len(stripes)] = stripes
    return bytes(image) + made.sectors(made.key, made.plain, made.sector)


def key_file(path: Path, passphrase: bytes = PASSPHRASE) -> Path:
    """Write a passphrase to a file that only its owner may read, as is required."""
    path.write_bytes(passphrase)
    path.chmod(0o600)
    return path
