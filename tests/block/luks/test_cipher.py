"""Encryption of whole sectors by AES."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.luks_images import aes_cbc, essiv, xts
from xenbackend.block.formats.luks_volume import Cipher
from xenbackend.block.luks import cipher as module
from xenbackend.block.luks.cipher import Sectors, address_of
from xenbackend.errors import DriverError

PLACE = 7 << 20  # byte offset of the first sector on its disk


def done(sectors: Sectors, data: bytes, place: int = PLACE, *, decrypt: bool = False) -> bytes:
    """Return data after they were encrypted or decrypted."""
    memory = bytearray(data)
    (sectors.decrypt if decrypt else sectors.encrypt)(address_of(memory), len(memory), place)
    return bytes(memory)


# IEEE Std 1619-2007, annex B: vectors 2, 3 (32 bytes) and 10 (AES-256, a sector of 512 bytes, its first bytes)
E, PI = (
    "2718281828459045235360287471352662497757247093699959574966967627",
    ("3141592653589793238462643383279502884197169399375105820974944592"),
)
VECTORS = [
    ("11" * 16 + "22" * 16, 0x3333333333, "44" * 32,
     "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"),
    ("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0" + "22" * 16, 0x3333333333, "44" * 32,
     "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89"),
    (E + PI, 0xFF, bytes(range(256)).hex() * 2, "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "number", "plain", "expected"), VECTORS)
def test_xts_is_the_standard_s(key: str, number: int, plain: str, expected: str) -> None:
    """The standard's test vectors are encrypted as it says, and decrypted again."""
    secret, data = bytearray.fromhex(key), bytes.fromhex(plain)
    sectors = Sectors(Cipher("aes-xts-plain64", len(secret)), secret, len(data), tweak=number)
    found = done(sectors, data, 0)

    assert expected == found[: len(expected) // 2].hex()
    assert data == done(sectors, found, 0, decrypt=True)


@pytest.mark.parametrize("sector", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("how", ["written", "begun"])
def test_many_sectors(size: int, sector: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sector is encrypted with its own number, counted in units of 512 bytes whatever its size, plus the tweak.
    The number is written directly into the library's context, or passed by a call if the library does not allow that.
    """
    if how == "begun":
        monkeypatch.setattr(module._Context, "find_number", lambda self: None)
    key, data = os.urandom(size), os.urandom(8 * sector)
    sectors = Sectors(Cipher("aes-xts-plain64", size), bytearray(key), sector, tweak=3)
    found = done(sectors, data)
    assert (how == "written") == (sectors._encrypting.number is not None)

    assert xts(key, data, sector, PLACE // 512 + 3) == found
    assert data == done(sectors, found, decrypt=True)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_cbc(size: int) -> None:
    """CBC modes: the initialization vector is the sector's number, or that number encrypted by the hash of the key."""
    key, data = os.urandom(size), os.urandom(2048)
    hidden = Sectors(Cipher("aes-cbc-essiv:sha256", size), bytearray(key))
    plain = Sectors(Cipher("aes-cbc-plain64", size), bytearray(key))
    one = data[:512]

    assert essiv(key, data, PLACE // 512) == done(hidden, data)
    assert data == done(hidden, done(hidden, data), decrypt=True)
    assert aes_cbc(key, (PLACE // 512).to_bytes(16, "little"), one) == done(plain, one)


@pytest.mark.parametrize("how", ["written", "begun"])
def test_plain_has_32_bits(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `plain` the sector number wraps around after 2 TiB, with `plain64` it does not."""
    if how == "begun":
        monkeypatch.setattr(module._Context, "find_number", lambda self: None)
    key, data, far = bytearray(os.urandom(64)), os.urandom(512), 512 << 32
    short, long = (Sectors(Cipher(f"aes-xts-{name}", 64), key) for name in ("plain", "plain64"))

    assert done(short, data, 0) == done(short, data, far) == done(long, data, 0)
    assert done(long, data, far) == xts(bytes(key), data, 512, 1 << 32)
    assert data == done(short, done(short, data, 0), far, decrypt=True)


@pytest.mark.parametrize("decrypt", [False, True])
@pytest.mark.parametrize("sectors", [1, 2])
def test_what_the_library_refuses_is_an_error(sectors: int, decrypt: bool) -> None:
    """If the library refuses a sector, here one shorter than a block of AES, the request fails."""
    refused = Sectors(Cipher("aes-xts-plain64", 64), bytearray(os.urandom(64)), size=8)
    with pytest.raises(OSError, match="libcrypto failed"):
        done(refused, bytes(8 * sectors), decrypt=decrypt)


def test_a_key_of_equal_halves_is_refused() -> None:
    """A key with equal halves makes XTS useless. The library refuses it, and so do we, with a message."""
    with pytest.raises(DriverError, match="the two halves are equal"):
        Sectors(Cipher("aes-xts-plain64", 64), bytearray(64))


def test_nothing_is_encrypted_after_the_end() -> None:
    """Once the key has been wiped, nothing is encrypted or decrypted, and closing again does no harm."""
    sectors = Sectors(Cipher("aes-xts-plain64", 64), bytearray(os.urandom(64)))
    sectors.close()
    sectors.close()
    with pytest.raises(OSError, match="this encryption is closed"):
        done(sectors, bytes(512))


def test_a_host_without_the_library_has_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the encryption library is not installed, the error names it."""
    module.find_libcrypto.cache_clear()
    monkeypatch.setattr(module, "_LIBRARY", "libnothing.so.0")
    with pytest.raises(
        DriverError,
        match=r"libnothing.so.0 of OpenSSL, which is needed for encryption, is not installed; install libssl3",
    ):
        module.find_libcrypto()
    module.find_libcrypto.cache_clear()


def test_nothing_is_loaded_later() -> None:
    """A worker behind its walls cannot open files: after `find_libcrypto` no call of the library opens a file."""
    program = """
import os, sys, ctypes
from xenbackend.block.formats.luks_volume import Cipher
from xenbackend.block.luks.cipher import Sectors, address_of, find_libcrypto
import hashlib
find_libcrypto()
for each in os.listdir("/proc/self/fd"):
    if int(each) > 2:
        try:
            os.close(int(each))
        except OSError:
            pass
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # whatever opens anything fails
KINDS = ("aes-xts-plain64", 64), ("aes-xts-plain", 32), ("aes-cbc-essiv:sha256", 32), ("aes-cbc-plain64", 16)
for text, size in KINDS:
    memory = bytearray(4096)
    sectors = Sectors(Cipher(text, size), bytearray(range(size)))
    sectors.encrypt(address_of(memory), 4096, 0)
    sectors.decrypt(address_of(memory), 4096, 0)
    assert not any(memory)
for name in ("sha1", "sha256", "sha512"):
    hashlib.pbkdf2_hmac(name, b"x", b"salt salt", 1000, 64)
    hashlib.new(name, b"x").digest()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)


class Other:
    """A library that reports another place for the sector's number."""

    def __init__(self, library: object, where: Callable[[int], int] | None) -> None:
        self._library = library
        self.EVP_CIPHER_CTX_iv_noconst = _Found(where) if where else None

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)


class _Found:
    """A function of such a library."""

    def __init__(self, where: Callable[[int], int]) -> None:
        self._where = where
        self.argtypes: object = None
        self.restype: object = None

    def __call__(self, address: int) -> int:
        return self._where(address)


@pytest.mark.parametrize("what", ["nowhere", "elsewhere", "beside", "missing"])
def test_a_number_that_does_not_count_is_not_written(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the library keeps the number elsewhere, or does not say where, a call passes it, with the right result."""
    library, ciphers = module.find_libcrypto()
    memory = bytearray(16)
    real = library.EVP_CIPHER_CTX_iv_noconst
    real.argtypes, real.restype = [ctypes.c_void_p], ctypes.c_void_p
    where = {
        "nowhere": lambda _: 0,
        "elsewhere": lambda _: address_of(memory),
        "beside": lambda address: real(address) + 8,
        "missing": None,
    }[what]
    monkeypatch.setattr(module, "find_libcrypto", lambda: (Other(library, where), ciphers))
    key, data = os.urandom(64), os.urandom(2048)
    sectors = Sectors(Cipher("aes-xts-plain64", 64), bytearray(key))

    assert sectors._encrypting.number is None
    assert xts(key, data, 512, PLACE // 512) == done(sectors, data)
