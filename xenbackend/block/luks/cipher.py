"""AES of whole sectors, in place, by OpenSSL's libcrypto. The loop over sectors is most of an encrypted disk's cost.

Must not be given memory that a guest can write to, nor keep a key anywhere but in libcrypto, which wipes it.

For each sector its number is set as the IV, and the sector is processed. If the library gives access to the IV in its
context (`EVP_CIPHER_CTX_iv_noconst`), and a trial gives the right result, to write it there takes 0.03 us; otherwise a
call takes 0.25 us. The second call (EVP_Cipher) takes 0.3 us plus the encryption itself. The calls keep the
interpreter's lock, since no other thread needs it. A process that gives up the right to open files has to call
`find_libcrypto` before, which makes the library load everything that it will need.

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
_NUMBER = 16  # bytes of a sector's number as an IV
_TRIED = 0x0123456789ABCDEF  # the sector number for the trial


class _Functions(Protocol):
    """The functions of libcrypto that are used."""

    EVP_CIPHER_fetch: Any
    EVP_CIPHER_CTX_new: Any
    EVP_CIPHER_CTX_free: Any
    EVP_CipherInit_ex: Any
    EVP_EncryptInit: Any
    EVP_DecryptInit: Any
    EVP_Cipher: Any


@cache
def find_libcrypto() -> tuple[_Functions, dict[str, int]]:
    """Return the library, and its handle of each kind of AES by OpenSSL's name for it. Raises: DriverError."""
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
    """Return the address of writable memory. The caller must keep the memory while it uses the address."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Sectors:
    """Encrypts and decrypts sectors under one key.

    Args:
        cipher: the cipher, already checked.
        key: the key, of the cipher's size; the caller may wipe it afterwards.
        size: bytes of a sector.
        tweak: a number that is added to each sector's number.

    Raises: DriverError, if the library refuses the key, such as one for XTS whose halves are equal.
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
        """Encrypt whole sectors in place; the first one is at byte `place` of the disk. Raises: OSError."""
        where = self._encrypting.number
        if length != self._size or where is None:
            self._do(self._encrypting, address, length, place)
            return
        where.value = place // SECTOR + self._tweak & self._mask  # common: one sector, without `_do`
        if self._work(self._encrypting.address, address, address, length) != length:
            raise _failed()

    def decrypt(self, address: int, length: int, place: int) -> None:
        """Decrypt whole sectors in place, as `encrypt` encrypts them. Raises: OSError."""
        where = self._decrypting.number
        if length != self._size or where is None:
            self._do(self._decrypting, address, length, place)
            return
        where.value = place // SECTOR + self._tweak & self._mask  # the same
        if self._work(self._decrypting.address, address, address, length) != length:
            raise _failed()

    def close(self) -> None:
        """Make the library wipe the key; `encrypt` and `decrypt` must not be called any more."""
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
            raise OSError(errno.EBADF, "this encryption is closed")
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
    """A cipher context of libcrypto, for one key and direction.

    address   of the context; 0 after `close`
    number    the low half of the IV in the context, whose high half is 0; None if it cannot be written directly
    """

    def __init__(self, library: _Functions, *, encrypts: bool) -> None:
        self._library = library
        self._encrypts = encrypts
        self._begin = library.EVP_EncryptInit if encrypts else library.EVP_DecryptInit
        self.address: int = library.EVP_CIPHER_CTX_new() or 0
        self.number: ctypes.c_uint64 | None = None

    def take_key(self, kind: int, key: bytearray | memoryview) -> bool:
        """Set kind and key. Return whether the library accepts them."""
        if not self.address:
            return False
        encrypts = int(self._encrypts)
        return bool(self._library.EVP_CipherInit_ex(self.address, kind, None, address_of(key), None, encrypts) == 1)

    def begin(self, name: bytes) -> bool:
        """Set the IV for a sector: its number, in 16 bytes. Return whether that succeeded."""
        return bool(self._begin(self.address, None, None, name) == 1)

    def find_number(self) -> None:
        """Find the IV in the context, and test that a number written there takes effect, and is kept after a call."""
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
        """Make the library wipe the key."""
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
