"""Requests and replies: which requests are refused with which error, and that any bytes are accepted or refused."""

from __future__ import annotations

import errno
import random

import pytest

from xenbackend.nbd.abi import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    MAX_BLOCK,
    REQUEST,
    REQUEST_MAGIC,
    Export,
    NbdError,
)
from xenbackend.nbd.transmission import Command, error_in, error_of, parse_command, reply

SIZE = 64 << 20
DISK = Export(SIZE, can_trim=True)
READ_ONLY = Export(SIZE, read_only=True)
PLAIN = Export(SIZE, can_flush=False)


def command(kind: int, offset: int = 0, length: int = 512, flags: int = 0) -> Command:
    """Return a request."""
    return Command(kind, flags, 7, offset, length)


def test_parse() -> None:
    """Each field is at the protocol's offset, big-endian."""
    wire = bytes.fromhex("25609513 0001 0001 0102030405060708 0000000000001000 00000200")
    parsed = parse_command(bytearray(wire + b"data"))

    assert Command(CMD_WRITE, 1, 0x0102030405060708, 4096, 512) == parsed
    assert (512, True) == (parsed.payload, parsed.must_be_durable)


def test_reply() -> None:
    """A reply repeats the cookie."""
    assert bytes.fromhex("67446698 00000005 0102030405060708") == reply(5, 0x0102030405060708)


@pytest.mark.parametrize(
    ("asked", "export", "error"),
    [
        (command(CMD_READ, SIZE - 512), DISK, 0),
        (command(CMD_READ, SIZE), DISK, errno.EINVAL),
        (command(CMD_READ, 2**64 - 512), DISK, errno.EINVAL),
        (command(CMD_READ, 0, MAX_BLOCK), DISK, 0),
        (command(CMD_READ, 0, MAX_BLOCK + 512), DISK, errno.EOVERFLOW),
        (command(CMD_READ, 1), DISK, errno.EINVAL),
        (command(CMD_READ, 0, 511), DISK, errno.EINVAL),
        (command(CMD_READ, 0, 0), DISK, 0),
        (command(CMD_READ, flags=1), DISK, 0),
        (command(CMD_READ, flags=1), PLAIN, errno.EINVAL),
        (command(CMD_READ, flags=2), DISK, errno.EINVAL),
        (command(CMD_WRITE), DISK, 0),
        (command(CMD_WRITE, flags=1), DISK, 0),
        (command(CMD_WRITE, flags=1), READ_ONLY, errno.EINVAL),
        (command(CMD_WRITE, SIZE), DISK, errno.ENOSPC),
        (command(CMD_WRITE), READ_ONLY, errno.EPERM),
        (command(CMD_TRIM, 0, SIZE), DISK, 0),
        (command(CMD_TRIM), PLAIN, errno.EINVAL),
        (command(CMD_TRIM), READ_ONLY, errno.EPERM),
        (command(CMD_FLUSH, 1, 1), DISK, 0),
        (command(CMD_FLUSH), PLAIN, errno.EINVAL),
        (command(CMD_FLUSH), READ_ONLY, errno.EINVAL),
        (command(CMD_DISC, 1, 1), READ_ONLY, 0),
        (command(6), DISK, errno.EINVAL),
    ],
)
def test_what_is_refused(asked: Command, export: Export, error: int) -> None:
    """A request outside of the disk, not aligned to blocks, or of a kind that is not offered gets the right error."""
    assert error == error_in(asked, export)


def test_fua_is_for_what_alters() -> None:
    """FUA has an effect on writes and trims only."""
    durable = {kind for kind in range(5) if command(kind, flags=1).must_be_durable}

    assert {CMD_WRITE, CMD_TRIM} == durable


@pytest.mark.parametrize(
    ("status", "error"), [(0, 0), (errno.ENOSPC, 28), (errno.EOPNOTSUPP, 95), (errno.EROFS, 5), (errno.ETIMEDOUT, 5)]
)
def test_error_numbers(status: int, error: int) -> None:
    """Error numbers of the protocol are passed on. Any other one becomes EIO."""
    assert error == error_of(status)


@pytest.mark.parametrize(
    ("magic", "length", "why"), [(1, 512, "begins with 0x1"), (REQUEST_MAGIC, MAX_BLOCK + 1, "a write of 33554433")]
)
def test_where_the_next_request_begins_is_not_known(magic: int, length: int, why: str) -> None:
    """A header with a wrong magic, or with more data than can be skipped, ends the connection."""
    with pytest.raises(NbdError, match=why):
        parse_command(bytearray(REQUEST.pack(magic, 0, CMD_WRITE, 0, 0, length)))


@pytest.mark.slow
def test_any_bytes() -> None:
    """Of 100,000 random headers, each is refused, or lies in the disk and asks for a limited number of bytes."""
    chance = random.Random(2)
    good = 0
    for _ in range(100_000):
        head = bytearray(chance.randbytes(REQUEST.size))
        head[:4] = REQUEST_MAGIC.to_bytes(4, "big")
        if chance.random() < 0.8:
            kind, offset = chance.randrange(7), chance.choice([0, SIZE, SIZE - 512, 512 * chance.getrandbits(18)])
            length = chance.choice([0, 512, 513, 512 * chance.getrandbits(17), chance.getrandbits(32)])
            REQUEST.pack_into(head, 0, REQUEST_MAGIC, chance.randrange(3), kind, 1, offset, length)
        try:
            asked = parse_command(head)
        except NbdError:
            continue
        assert asked.payload <= MAX_BLOCK
        if error_in(asked, DISK) == 0 and asked.kind in (CMD_READ, CMD_WRITE, CMD_TRIM):
            good += 1
            assert asked.offset + asked.length <= SIZE
            assert asked.kind == CMD_TRIM or asked.length <= MAX_BLOCK
    assert good > 5_000
