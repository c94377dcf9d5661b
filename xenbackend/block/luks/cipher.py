"""AES of whole sectors, in place, by OpenSSL's libcrypto: what the loop over sectors costs decides what a disk costs.

Must not be given memory that a guest can write to, nor keep a key anywhere but in libcrypto, which wipes it.

Each sector has to be begun with its number, and done. Where the library lets the number be written to where it keeps it
(`EVP_CIPHER_CTX_iv_noconst`), and a trial gives what it should, that takes 0.03 us, else a call of 0.25 us; the other
call (EVP_Cipher) takes 0.3 us and the work. They keep the interpreter's lock, as nobody else wants it. Whoever gives up
the right to open files calls `find_libcrypto` before: it has the library load all that it will need.

Sources: EVP_EncryptInit(3), EVP_CIPHER_CTX_get_original_iv(3); dm-crypt's documentation for numbers of sectors (plain,
plain64, essiv).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from xenbackend.block.formats.luks_volume import Cipher
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR

_LIBRARY = "libcrypto.so.3"
_NAMES = {(size, kind): f"AES-{bits}-{kind}" for size, bits, kind in (
    (32, 128, "XTS"), (64, 256, "XTS"),
    (16, 128, "CBC"), (24, 192, "CBC"), (32, 256, "CBC"),
    (32, 256, "ECB"),
)}  # fmt: skip
_NUMBER = 16  # bytes of a sector's number as AES has it
_TRIED = 0x0123456789ABCDEF


class _Functions(Protocol):
    """Those of libcrypto that are used."""

    EVP_CIPHER_fetch: Any
    EVP_CIPHER_CTX_new: Any
    EVP_CIPHER_CTX_free: Any
    EVP_CipherInit_ex: Any
    EVP_EncryptInit: Any
    EVP_DecryptInit: Any
    EVP_Cipher: Any


@cache
def find_libcrypto() -> tuple[_Functions, dict[str, int]]:
    """Return the library, and what it has of each kind of AES by its name there. Raises: DriverError."""
    try:
        found = ctypes.PyDLL(_LIBRARY)
    except OSError as error:
        raise DriverError(
            f"{_LIBRARY} of OpenSSL, which is needed for encryption, is not installed; install libssl3"
        ) from error
    address, text = ctypes.c_void_p, ctypes.c_char_p
    found.EVP_CIPHER_fetch.argtypes, found.EVP_CIPHER_fetch.restype = [address, text, text], address
    found.EVP_CIPHER_CTX_new.argtypes, found.EVP_CIPHER_CTX_new.restype = [], address
    found.EVP_CIPHER_CTX_free.argtypes, found.EVP_CIPHER_CTX_free.restype = [address], None
    found.EVP_CipherInit_ex.argtypes = [address, address, address, address, address, ctypes.c_int]
    for begin in (found.EVP_EncryptInit, found.EVP_DecryptInit):
        begin.argtypes = [address, address, address, text]
    found.EVP_Cipher.argtypes = [address, address, address, ctypes.c_uint]
    ciphers = {name: found.EVP_CIPHER_fetch(None, name.encode(), None) for name in sorted(set(_NAMES.values()))}
    if not all(ciphers.values()):
        raise DriverError(f"{_LIBRARY} lacks the AES modes that LUKS uses")
    return found, ciphers


def address_of(memory: memoryview | bytearray) -> int:
    """Return where writable memory lies; whoever uses that keeps the memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Sectors:
    """Encrypts and decrypts sectors under one key.

    Args:
        cipher: which one; it was checked.
        key: of its size; not needed any more when this has returned.
        size: bytes of a sector.
        tweak: what is added to a sector's number.

    Raises: DriverError, where the library takes no such key: one of XTS whose halves are equal.
    """

    def __init__(self, cipher: Cipher, key: bytearray | memoryview, size: int = SECTOR, tweak: int = 0) -> None:
        self._library, ciphers = find_libcrypto()
        self._work = self._library.EVP_Cipher
        self._size, self._tweak, self._mask = size, tweak, cipher.number_mask
        self._contexts: list[_Context] = []
        kind = ciphers[_NAMES[len(key), "XTS" if cipher.is_xts else "CBC"]]
        self._encrypting = self._context(kind, key, encrypts=True)
        self._decrypting = self._context(kind, key, encrypts=False)
        self._essiv: _Context | None = None
        if cipher.is_xts:
            for context in self._contexts:
                context.find_number()
        if cipher.has_essiv:
            salt = bytearray(hashlib.sha256(key).digest())
            self._essiv = self._context(ciphers[_NAMES[len(salt), "ECB"]], salt, encrypts=True)
            self._number = bytearray(_NUMBER)
            self._number_at = address_of(self._number)
            salt[:] = bytes(len(salt))

    def encrypt(self, address: int, length: int, place: int) -> None:
        """Encrypt whole sectors in place, the first one of which is at byte `place` of the disk. Raises: OSError."""
        where = self._encrypting.number
        if length != self._size or where is None:
            self._do(self._encrypting, address, length, place)
            return
        where.value = place // SECTOR + self._tweak & self._mask  # of one sector, as most are: `_do` without its loop
        if self._work(self._encrypting.address, address, address, length) != length:
            raise _failed()

    def decrypt(self, address: int, length: int, place: int) -> None:
        """Decrypt likewise. Raises: OSError."""
        where = self._decrypting.number
        if length != self._size or where is None:
            self._do(self._decrypting, address, length, place)
            return
        where.value = place // SECTOR + self._tweak & self._mask  # the same
        if self._work(self._decrypting.address, address, address, length) != length:
            raise _failed()

    def close(self) -> None:
        """Have the library wipe the key; nothing is encrypted any more."""
        for context in self._contexts:
            context.close()

    def _context(self, kind: int, key: bytearray | memoryview, *, encrypts: bool) -> _Context:
        context = _Context(self._library, encrypts=encrypts)
        self._contexts.append(context)
        if not context.take_key(kind, key):
            self.close()
            raise DriverError("AES cannot use its key: the two halves are equal, or it is damaged")
        return context

    def _do(self, context: _Context, address: int, length: int, place: int) -> None:
        at_work = context.address
        if not at_work:
            raise OSError(errno.EBADF, "encryption after its end")
        size, work, mask = self._size, self._work, self._mask
        number, step = place // SECTOR + self._tweak, size // SECTOR
        where = context.number
        if where is not None:
            for at in range(address, address + length, size):
                where.value = number & mask
                if work(at_work, at, at, size) != size:
                    raise _failed()
                number += step
            return
        for at in range(address, address + length, size):
            name = (number & mask).to_bytes(_NUMBER, "little")
            if self._essiv is not None:
                name = self._encrypted(self._essiv, name)
            if not context.begin(name) or work(at_work, at, at, size) != size:
                raise _failed()
            number += step

    def _encrypted(self, essiv: _Context, name: bytes) -> bytes:
        self._number[:] = name
        if self._library.EVP_Cipher(essiv.address, self._number_at, self._number_at, _NUMBER) != _NUMBER:
            raise _failed()
        return bytes(self._number)


class _Context:
    """What libcrypto knows of one key and direction.

    address   0: it has ended
    number    the low half of the number of a sector, where it can be written to; its high half is 0 then
    """

    def __init__(self, library: _Functions, *, encrypts: bool) -> None:
        self._library = library
        self._encrypts = encrypts
        self._begin = library.EVP_EncryptInit if encrypts else library.EVP_DecryptInit
        self.address: int = library.EVP_CIPHER_CTX_new() or 0
        self.number: ctypes.c_uint64 | None = None

    def take_key(self, kind: int, key: bytearray | memoryview) -> bool:
        """Return whether AES of this kind takes the key."""
        if not self.address:
            return False
        encrypts = int(self._encrypts)
        return bool(self._library.EVP_CipherInit_ex(self.address, kind, None, address_of(key), None, encrypts) == 1)

    def begin(self, name: bytes) -> bool:
        """Begin a sector by its number, in 16 bytes. Returns whether that could be done."""
        return bool(self._begin(self.address, None, None, name) == 1)

    def find_number(self) -> None:
        """Find where the number is kept, and try out whether what is written there counts, and stays."""
        find = getattr(self._library, "EVP_CIPHER_CTX_iv_noconst", None)
        if find is None or not self.begin(bytes(_NUMBER)):
            return
        find.argtypes, find.restype = [ctypes.c_void_p], ctypes.c_void_p
        where = find(self.address)
        if not where:
            return
        found = ctypes.c_uint64.from_address(where)
        expected = [self._tried(lambda: self.begin(_TRIED.to_bytes(_NUMBER, "little")))] * 2
        self.begin(bytes(_NUMBER))
        written = [self._tried(lambda: setattr(found, "value", _TRIED)), self._tried(lambda: None)]
        if written == expected and written != [self._tried(lambda: self.begin(bytes(_NUMBER)))] * 2:
            self.number = found

    def close(self) -> None:
        """Have the library wipe the key."""
        self.number = None
        self._library.EVP_CIPHER_CTX_free(self.address)
        self.address = 0

    def _tried(self, begin: Callable[[], object]) -> bytes:
        memory = bytearray(2 * _NUMBER)
        begin()
        self._library.EVP_Cipher(self.address, address_of(memory), address_of(memory), len(memory))
        return bytes(memory)


def _failed() -> OSError:
    return OSError(errno.EIO, "libcrypto failed")
