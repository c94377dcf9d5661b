"""The server's handshake: the answer to each option, in one piece and byte by byte, and what clients cannot cause."""

from __future__ import annotations

import random
from struct import pack

import pytest

from xenbackend.nbd.abi import (
    IHAVEOPT,
    MAX_BLOCK,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ACK,
    REP_ERR_INVALID,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_SERVER,
    Export,
    NbdError,
)
from xenbackend.nbd.handshake import GREETING, MAX_OPTION, MAX_OPTIONS, Handshake, Phase

EXPORT = Export(size=1 << 30, can_trim=True)
FLAGS = pack(">I", 3)
STARTTLS, STRUCTURED_REPLY = 5, 8
NO_NAME = pack(">IH", 0, 0)  # an empty name, and no information requests


def option(number: int, data: bytes = b"") -> bytes:
    """Return an option as a client sends it."""
    return IHAVEOPT + pack(">II", number, len(data)) + data


def replies(answer: bytes) -> list[tuple[int, int, bytes]]:
    """Return option, type and data of each reply."""
    found = []
    while answer:
        magic, number, kind, length = OPTION_REPLY.unpack_from(answer)
        assert OPTION_REPLY_MAGIC == magic
        found.append((number, kind, answer[OPTION_REPLY.size : OPTION_REPLY.size + length]))
        answer = answer[OPTION_REPLY.size + length :]
    return found


def begun(flags: int = 3) -> Handshake:
    """Return a handshake that has taken the client's flags."""
    handshake = Handshake(EXPORT)
    assert b"" == handshake.take(bytearray(pack(">I", flags)))
    return handshake


def test_greeting() -> None:
    """The greeting announces fixed newstyle, and that the zeros can be omitted."""
    assert b"NBDMAGICIHAVEOPT\x00\x03" == GREETING


@pytest.mark.parametrize("number", [OPT_GO, OPT_INFO])
def test_export_is_described(number: int) -> None:
    """GO and INFO are answered with size, flags and block sizes, asked for or not. After GO, requests follow."""
    handshake = begun()
    answer = replies(handshake.take(bytearray(option(number, NO_NAME))))

    assert [
        (number, REP_INFO, pack(">HQH", 0, 1 << 30, EXPORT.flags)),
        (number, REP_INFO, pack(">HIII", 3, 512, 4096, MAX_BLOCK)),
        (number, REP_ACK, b""),
    ] == answer
    assert (handshake.phase is Phase.TRANSMISSION) == (number == OPT_GO)


@pytest.mark.parametrize(("flags", "zeroes"), [(3, 0), (1, 124), (0, 124)])
def test_export_name(flags: int, zeroes: int) -> None:
    """EXPORT_NAME is answered with size and flags, followed by zeros unless the client has declined them."""
    handshake = begun(flags)

    assert pack(">QH", 1 << 30, EXPORT.flags) + bytes(zeroes) == handshake.take(bytearray(option(OPT_EXPORT_NAME)))
    assert Phase.TRANSMISSION is handshake.phase


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (option(OPT_LIST), [(OPT_LIST, REP_SERVER, bytes(4)), (OPT_LIST, REP_ACK, b"")]),
        (option(OPT_LIST, b"x"), [(OPT_LIST, REP_ERR_INVALID, b"")]),
        (option(STARTTLS), [(STARTTLS, REP_ERR_UNSUP, b"")]),
        (option(STRUCTURED_REPLY, b"data"), [(STRUCTURED_REPLY, REP_ERR_UNSUP, b"")]),
        (option(OPT_GO, b""), [(OPT_GO, REP_ERR_INVALID, b"")]),
        (option(OPT_GO, pack(">IH", 1, 0)), [(OPT_GO, REP_ERR_INVALID, b"")]),
        (option(OPT_GO, pack(">IH", 2**32 - 1, 0)), [(OPT_GO, REP_ERR_INVALID, b"")]),
        (option(OPT_GO, pack(">IH", 0, 1)), [(OPT_GO, REP_ERR_INVALID, b"")]),
        (option(OPT_GO, NO_NAME + b"x"), [(OPT_GO, REP_ERR_INVALID, b"")]),
        (option(OPT_INFO, pack(">I1sH", 1, b"x", 0)), [(OPT_INFO, REP_ERR_UNKNOWN, b"the only export has no name")]),
    ],
)
def test_other_options_go_on(sent: bytes, expected: list[tuple[int, int, bytes]]) -> None:
    """An unknown or wrong option, or one that only asks, is answered, and the next one is expected."""
    handshake = begun()

    assert expected == replies(handshake.take(bytearray(sent)))
    assert Phase.OPTIONS is handshake.phase


def test_abort() -> None:
    """ABORT is acknowledged, and nothing after it is read."""
    handshake = begun()
    received = bytearray(option(OPT_ABORT) + option(OPT_LIST))

    assert [(OPT_ABORT, REP_ACK, b"")] == replies(handshake.take(received))
    assert Phase.ENDED is handshake.phase
    assert option(OPT_LIST) == received


def test_requests_right_behind_are_left() -> None:
    """Bytes that a client sends right after GO are left for the transmission phase."""
    received = bytearray(FLAGS + option(OPT_GO, NO_NAME) + b"requests")
    Handshake(EXPORT).take(received)

    assert b"requests" == received


def test_byte_by_byte() -> None:
    """The answers are the same however the bytes are cut."""
    sent = FLAGS + option(STARTTLS) + option(OPT_LIST) + option(OPT_GO, NO_NAME)
    whole = Handshake(EXPORT).take(bytearray(sent))
    handshake, received, answers = Handshake(EXPORT), bytearray(), b""
    for byte in sent:
        received.append(byte)
        answers += handshake.take(received)

    assert whole == answers
    assert b"" == received


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (pack(">I", 4), "flags 0x4"),
        (FLAGS + b"IHAVENOTOPTION__", "b'IHAVENOT'"),
        (FLAGS + IHAVEOPT + pack(">II", 99, MAX_OPTION + 1), "8193 bytes"),
        (FLAGS + option(OPT_EXPORT_NAME, b"disk\x1b"), r"b'disk\x1b'"),
        (FLAGS + option(OPT_LIST) * (MAX_OPTIONS + 1), "more than 32 options"),
    ],
)
def test_broken_protocol(sent: bytes, why: str) -> None:
    """Bytes that have no valid answer end the connection, with a message of printable characters."""
    with pytest.raises(NbdError) as caught:
        Handshake(EXPORT).take(bytearray(sent))

    assert why in str(caught.value)
    assert str(caught.value).isprintable()


def mutant(chance: random.Random) -> bytes:
    """Return a client's bytes, some of which are wrong."""
    sent = bytearray(chance.choice([FLAGS, FLAGS, pack(">I", chance.getrandbits(3))]))
    for _ in range(chance.randrange(4)):
        data = chance.choice([b"", NO_NAME, pack(">IH", chance.getrandbits(33) >> 1, 1), chance.randbytes(9)])
        sent += option(chance.choice([1, 2, 3, 5, 6, 7, 8, chance.getrandbits(32)]), data)
    for _ in range(chance.choice([0, 0, 1, 2])):
        sent[chance.randrange(len(sent))] = chance.getrandbits(8)
    return bytes(sent)


@pytest.mark.slow
def test_any_bytes() -> None:
    """100,000 clients, some of them wrong, are each answered as the protocol says or disconnected. None is kept."""
    chance = random.Random(1)
    phases = set()
    for _ in range(100_000):
        handshake = Handshake(EXPORT)
        received = bytearray(mutant(chance))
        before = len(received)
        try:
            answer = handshake.take(received)
        except NbdError:
            continue
        phases.add(handshake.phase)
        if handshake.phase is not Phase.TRANSMISSION:
            replies(answer)
            assert len(received) < max(before, MAX_OPTION)
    assert {Phase.OPTIONS, Phase.TRANSMISSION, Phase.ENDED} == phases
