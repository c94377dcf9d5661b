"""The header of an encrypted volume as values, the same for LUKS1 and LUKS2.

Must not read a header: `luks1` and `luks2` do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from xenbackend.block.keys import HASHES, Derivation
from xenbackend.errors import DriverError, printable
from xenbackend.units import SECTOR

MAGIC = b"LUKS\xba\xbe"
MAX_SLOTS = 32  # of LUKS2; LUKS1 has 8
MAX_STRIPES = 4000  # the number that every tool writes
MAX_DIGEST_ITERATIONS = 20_000_000  # of PBKDF2 over a volume key, which a worker does: seconds
_XTS_SIZES, _CBC_SIZES = (32, 64), (16, 24, 32)  # bytes of a key of AES
_KNOWN = {
    "aes-xts-plain64": _XTS_SIZES,
    "aes-xts-plain": _XTS_SIZES,
    "aes-cbc-essiv:sha256": _CBC_SIZES,
    "aes-cbc-plain64": _CBC_SIZES,
    "aes-cbc-plain": _CBC_SIZES,
}


def damaged(problem: str) -> DriverError:
    """Return the error for a header that is inconsistent."""
    return DriverError(f"its LUKS header is damaged: {problem}; look at it with cryptsetup luksDump")


@dataclass(frozen=True, slots=True)
class Cipher:
    """The encryption of sectors; `text` is in dm-crypt's syntax, such as aes-xts-plain64."""

    text: str
    key_size: int  # bytes

    def check(self) -> None:
        """Check that the cipher is known. Raises: DriverError."""
        if self.text not in _KNOWN:
            raise DriverError(
                f"it is encrypted by {printable(self.text[:60])}, and this driver supports {', '.join(_KNOWN)}; open "
                "it with `cryptsetup open`, and serve that device by aio:"
            )
        if self.key_size not in _KNOWN[self.text]:
            raise damaged(f"a key of {self.key_size} bytes for {self.text}")

    @property
    def is_xts(self) -> bool:
        """Whether the mode is XTS; else it is CBC."""
        return "-xts-" in self.text

    @property
    def has_essiv(self) -> bool:
        """Whether a sector's number is encrypted before it is used as the IV."""
        return self.text.endswith("essiv:sha256")

    @property
    def number_mask(self) -> int:
        """The bits of a sector's number that are used."""
        return (1 << 32) - 1 if self.text.endswith("-plain") else (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Slot:
    """A key slot: the volume key, split into stripes and encrypted by a key that is derived from a passphrase."""

    number: int
    derivation: Derivation
    cipher: Cipher
    offset: int  # bytes, on the disk
    hash: str  # with which the stripes were made
    stripes: int = MAX_STRIPES

    def length(self, key_size: int) -> int:
        """Return the size of its stripes in bytes."""
        return key_size * self.stripes

    def check(self, key_size: int, first: int, end: int) -> None:
        """Check its numbers, and that its stripes are between bytes `first` and `end`. Raises: DriverError."""
        self.derivation.check()
        self.cipher.check()
        if not 1 <= self.stripes <= MAX_STRIPES or self.hash not in HASHES:
            raise damaged(f"key slot {self.number} has {self.stripes} stripes by {printable(self.hash[:32])}")
        if self.offset % SECTOR or not first <= self.offset <= end - self.length(key_size):
            raise damaged(f"key slot {self.number} lies at byte {self.offset}, outside of the area for key slots")


@dataclass(frozen=True, slots=True)
class Digest:
    """PBKDF2 of the volume key, to recognise the right key."""

    hash: str
    iterations: int
    salt: bytes
    value: bytes

    def check(self) -> None:
        """Check its numbers. Raises: DriverError."""
        if self.hash not in HASHES:
            known = ", ".join(HASHES)
            raise DriverError(
                f"the digest of its key uses the hash {printable(self.hash[:32])}; this driver supports {known}"
            )
        if not 8 <= len(self.salt) <= 64 or not 16 <= len(self.value) <= 64:
            raise damaged(f"the digest of its key has {len(self.value)} bytes, and {len(self.salt)} bytes of salt")
        if not 1 <= self.iterations <= MAX_DIGEST_ITERATIONS:
            raise DriverError(
                f"the digest of its key needs {self.iterations} iterations, more than {MAX_DIGEST_ITERATIONS}"
            )

    def fits(self, key: bytearray) -> bool:
        """Return whether a key is that of the volume."""
        return hashlib.pbkdf2_hmac(self.hash, key, self.salt, self.iterations, len(self.value)) == self.value


@dataclass(frozen=True, slots=True)
class Volume:
    """An encrypted disk: `size` bytes from `offset` on; size 0: up to the end of the disk that it is on.

    tweak   is added to the number of a sector; both are in units of 512 bytes
    slots   in the order in which they are tried
    """

    version: int
    cipher: Cipher
    offset: int
    size: int
    digest: Digest
    slots: tuple[Slot, ...]
    sector_size: int = SECTOR
    tweak: int = 0

    @property
    def identity(self) -> bytes:
        """32 bytes that identify this volume and the place of its data."""
        said = [getattr(self, each.name) for each in fields(self) if each.name not in ("slots", "size")]
        return hashlib.sha256(repr(said).encode()).digest()
