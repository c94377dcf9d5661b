"""Finding a volume's key."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import pytest

from tests.luks_images import PASSPHRASE, Made, luks1, luks2, split
from xenbackend.block.formats import luks
from xenbackend.block.keys import Derivation
from xenbackend.block.luks.unlock import find_key, merge
from xenbackend.errors import DriverError


@pytest.mark.parametrize("name", ["sha1", "sha224", "sha256", "sha384", "sha512"])
@pytest.mark.parametrize(("size", "count"), [(64, 4000), (32, 100), (16, 2), (24, 1)])
def test_stripes_are_joined(name: str, size: int, count: int) -> None:
    """Stripes that the specification's splitter made from a key are merged into it again, unless a bit was changed."""
    key = os.urandom(size)
    stripes = bytearray(split(key, count, name))
    assert key == merge(stripes, size, count, name)
    stripes[0] ^= 1

    assert key != merge(stripes, size, count, name)


def derived(passphrase: bytes, given: list[memoryview]) -> object:
    """Return a function that derives keys from a passphrase and records them."""

    def derive(how: Derivation) -> memoryview:
        given.append(
            memoryview(bytearray(hashlib.pbkdf2_hmac(how.hash, passphrase, how.salt, how.iterations, how.length)))
        )
        return given[-1]

    return derive


@pytest.mark.parametrize("make", [luks1, luks2])
def test_the_first_slot_that_opens(make: Callable[[Made], bytes]) -> None:
    """Slots are tried in order, and all keys that were derived on the way are wiped."""
    made = Made(bytes(8192), passphrases=[b"other", PASSPHRASE, b"third"])
    image = make(made)
    volume = luks.parse(lambda offset, length: image[offset : offset + length], len(image))
    held: list[bytearray] = []

    def derive(how: Derivation) -> memoryview:
        held.append(bytearray(hashlib.pbkdf2_hmac(how.hash, PASSPHRASE, how.salt, how.iterations, how.length)))
        return memoryview(held[-1])

    found = find_key(volume, lambda offset, length: image[offset : offset + length], derive, len(image))

    assert (1, bytearray(made.key)) == found
    assert [bytearray(64)] * 2 == held


def test_no_slot_that_opens_is_no_key() -> None:
    """A wrong passphrase opens no slot. Errors of the key derivation are passed on, and no key is left in memory."""
    image = luks1(Made(bytes(8192)))
    volume = luks.parse(lambda offset, length: image[offset : offset + length], len(image))
    look = lambda offset, length: image[offset : offset + length]  # noqa: E731 - one line
    assert find_key(volume, look, derived(b"wrong", []), len(image)) is None

    def refuses(how: Derivation) -> memoryview:
        raise DriverError("no memory")

    with pytest.raises(DriverError, match="no memory"):
        find_key(volume, look, refuses, len(image))
