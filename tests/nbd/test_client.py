"""Tests of `xenbackend.nbd.client`, with our own server's handshake and with servers that break the protocol."""

from __future__ import annotations

from struct import pack

import pytest

from xenbackend.nbd.abi import IHAVEOPT, NBDMAGIC, SEND_FLUSH, SEND_TRIM, Export, NbdError
from xenbackend.nbd.client import MAX_REPLIES, ClientHandshake, Offer, Refused
from xenbackend.nbd.handshake import GREETING, Handshake, Phase

REPLY = 0x3E889045565A9
WELCOME = NBDMAGIC + IHAVEOPT + pack(">H", 3)


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return an option reply."""
    return pack(">QIII", REPLY, option, kind, len(data)) + data


def heard(client: ClientHandshake, *messages: bytes) -> bytes:
    """Return the client's answer to the last of these messages."""
    for message in messages:
        said = client.take(bytearray(message))
    return said


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_both_sides_of_ours_agree(step: int) -> None:
    """Our client gets the offer of our server, in pieces of any size, and no bytes are left over."""
    export = Export(size=1 << 30, preferred_block=8192, can_trim=True)
    server, client = Handshake(export), ClientHandshake("")
    to_client, to_server = bytearray(GREETING), bytearray()
    while client.offer is None:
        given = bytearray()
        while to_client:
            given += to_client[:step]
            del to_client[:step]
            to_server += client.take(given)
        to_client += server.take(to_server)
    assert Phase.TRANSMISSION is server.phase
    assert Offer(1 << 30, export.flags, min_block=512, preferred_block=8192, max_block=32 << 20) == client.offer
    assert client.offer.flags & SEND_FLUSH
    assert client.offer.flags & SEND_TRIM


def test_what_a_server_can_do_is_agreed_on() -> None:
    """The client asks for structured replies, then for the context of block status, then for the export by name."""
    client = ClientHandshake("ä")
    assert heard(client, WELCOME).endswith(IHAVEOPT + pack(">II", 8, 0))
    name = pack(">I", 2) + "ä".encode()
    assert IHAVEOPT + pack(">II", 10, 29) + name + pack(">II", 1, 15) + b"base:allocation" == heard(client, reply(8, 1))
    go = heard(client, reply(10, 4, pack(">I", 9) + b"base:allocation"), reply(10, 1))
    assert IHAVEOPT + pack(">II", 7, 10) + name + pack(">HH", 1, 3) == go
    heard(client, reply(7, 3, pack(">HQH", 0, 4096, 1)), reply(7, 3, pack(">HIII", 3, 1, 4096, 1 << 31)), reply(7, 1))
    assert Offer(4096, 1, True, 9, 1, 4096, 32 << 20) == client.offer


@pytest.mark.parametrize(
    ("kind", "said", "why"),
    [
        (1 << 31 | 6, b"never heard of", "no export 'x'.*never heard of"),
        (1 << 31 | 2, b"", "does not let this client use"),
        (1 << 31 | 5, b"", "TLS"),
        (1 << 31 | 1, b"", "NBD_OPT_GO"),
        (1 << 31 | 7, b"", "shutting down"),
        (1 << 31 | 99, b"\x1b[2Jbad", r"refuses the export 'x' \(\\x1b"),
    ],
)
def test_a_refusal_is_a_sentence(kind: int, said: bytes, why: str) -> None:
    """Each kind of refusal has its own message, with the server's words in printable form."""
    client = ClientHandshake("x")
    heard(client, WELCOME, reply(8, 1 << 31 | 1))
    with pytest.raises(Refused, match=why):
        client.take(bytearray(reply(7, kind, said)))


WRONG = {
    "another service": [b"SSH-2.0"],
    "another magic": [WELCOME, b"x" * 20],
    "another option": [WELCOME, reply(7, 1)],
    "a huge reply": [WELCOME, pack(">QIII", REPLY, 8, 1, 1 << 31)],
    "a strange answer": [WELCOME, reply(8, 3)],
    "no size": [WELCOME, reply(8, 1 << 31 | 1), reply(7, 1)],
    "no power of two": [
        WELCOME, reply(8, 1 << 31 | 1), reply(7, 3, pack(">HQH", 0, 4096, 1)), reply(7, 3, pack(">HIII", 3, 3, 3, 9)),
        reply(7, 1),
    ],
    "an order that cannot be": [
        WELCOME, reply(8, 1 << 31 | 1), reply(7, 3, pack(">HQH", 0, 4096, 1)), reply(7, 3, pack(">HIII", 3, 8, 4, 2)),
        reply(7, 1),
    ],
    "words before they are asked for": [
        WELCOME, reply(8, 1 << 31 | 1), reply(7, 3, pack(">HQH", 0, 4096, 1)), reply(7, 1) + b"x",
    ],
    "no end": [WELCOME, reply(8, 1), *[reply(10, 4, bytes(8))] * MAX_REPLIES],
}  # fmt: skip


@pytest.mark.parametrize("messages", WRONG.values(), ids=WRONG)
def test_what_no_server_says_ends_the_handshake(messages: list[bytes]) -> None:
    """A server that breaks the protocol ends the handshake with an error."""
    with pytest.raises(NbdError):
        heard(ClientHandshake(""), *messages)


def test_an_old_server_is_refused() -> None:
    """A server with the old style, or with a new style that is not fixed, is refused by name."""
    for greeting in (NBDMAGIC + pack(">QH", 0x00420281861253, 3), NBDMAGIC + IHAVEOPT + pack(">H", 0)):
        with pytest.raises(Refused, match="old form"):
            ClientHandshake("").take(bytearray(greeting))
