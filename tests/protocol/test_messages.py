"""Tests of `xenbackend.protocol.messages`: each message comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import json
import random
from dataclasses import MISSING, fields, replace
from typing import Any, get_args, get_type_hints

import pytest

from xenbackend.protocol import messages
from xenbackend.protocol.messages import VERSION, LayerFacts, RingParameters, UnknownKind, decode, encode

KINDS = get_args(messages.Message)
LETTERS = 'az AZ09-_/\\"\n\0\x7f\u00e4\u20ac\U0001f4be\udc80'  # \udc80: a byte of a path that is no UTF-8
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def random_value(chance: random.Random, wanted: Any) -> Any:
    """Return a value of an annotated type."""
    if wanted in {LayerFacts, RingParameters}:
        return random_message(chance, wanted)
    if wanted is bool:
        return chance.random() < 0.5
    if wanted is int:
        return chance.choice([0, 1, -1, 2**31, 2**64 - 1, chance.getrandbits(40)])
    if wanted is str:
        return "".join(chance.choices(LETTERS, k=chance.randrange(30)))
    some = range(chance.randrange(4))
    inner = get_args(wanted)
    if wanted == dict[str, Any]:
        return {f"key{place}": chance.choice([1, 0.5, "text", None, True, [1, "a"], {"b": []}]) for place in some}
    if wanted == dict[str, str]:
        return {random_value(chance, str): random_value(chance, str) for _ in some}
    return [random_value(chance, inner[0]) for _ in some]


def random_message(chance: random.Random, kind: type[Any]) -> Any:
    """Return a message of a kind with random content."""
    return kind(**{name: random_value(chance, wanted) for name, wanted in get_type_hints(kind).items()})


def plain(message: Any) -> dict[str, Any]:
    """Return what is in a message's datagram."""
    values: dict[str, Any] = json.loads(encode(message))
    return values


@each_kind
def test_round_trip(kind: type[Any]) -> None:
    """A message of any content comes out of its datagram as it went in, of the same type throughout."""
    chance = random.Random(kind.__name__)
    for _ in range(100):
        message = random_message(chance, kind)

        assert message == decode(encode(message))


def test_every_kind_can_be_decoded() -> None:
    """The kinds that `Message` lists are the ones that `decode` knows."""
    assert {kind.__name__ for kind in KINDS} == set(messages._KINDS)


@each_kind
def test_a_message_needs_the_fields_that_have_no_default(kind: type[Any]) -> None:
    """A datagram that lacks a field is refused, or has that field's default where there is one: an older program's."""
    message = random_message(random.Random(1), kind)
    for each in fields(kind):
        datagram = json.dumps({name: value for name, value in plain(message).items() if name != each.name}).encode()
        if each.default is MISSING and each.default_factory is MISSING:
            with pytest.raises(ValueError, match=r"where a message has"):
                decode(datagram)
        else:
            default = each.default if each.default is not MISSING else each.default_factory()
            assert replace(message, **{each.name: default}) == decode(datagram)


@each_kind
def test_a_field_that_is_not_known_is_passed_over(kind: type[Any]) -> None:
    """A newer program may say more than we understand: what we do understand holds."""
    message = random_message(random.Random(3), kind)

    assert message == decode(json.dumps({**plain(message), "surprise": [1]}).encode())


def test_what_a_message_holds_may_be_of_another_program_too() -> None:
    """A part of a message follows the same rules as a message."""
    layer = LayerFacts("null:1G", 1 << 30, 512, False, True, False, 0, 0, parent_of="x", facts={"a": "b"})
    values = plain(messages.Opened([layer]))
    [part] = values["layers"]
    del part["parent_of"], part["facts"]
    part["surprise"] = 1

    assert messages.Opened([replace(layer, parent_of="", facts={})]) == decode(json.dumps(values).encode())
    del part["size"]
    with pytest.raises(ValueError, match="where a message has"):
        decode(json.dumps(values).encode())


@each_kind
def test_fields_have_their_types(kind: type[Any]) -> None:
    """A field of another type is refused, so that nobody need look twice at what a worker says."""
    values = plain(random_message(random.Random(2), kind))
    for name, wanted in get_type_hints(kind).items():
        for wrong in (None, 1.5, 1, True, "text", [None], [[1]], {"a": 1}, [{"grefs": [1]}]):
            if type(wrong) is wanted or (wanted == dict[str, Any] and isinstance(wrong, dict)):
                continue
            with pytest.raises(ValueError, match=r"where a message has|not a known"):
                decode(json.dumps({**values, name: wrong}).encode())


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, str(VERSION), True, float(VERSION), [VERSION]])
def test_another_version_is_refused(version: Any) -> None:
    """Only a message of exactly our version is taken."""
    values = {**plain(messages.Close()), "version": version}
    with pytest.raises(ValueError, match=r"version|where a message has"):
        decode(json.dumps(values).encode())


@pytest.mark.parametrize("kind", [None, "", "close", "LayerFacts", "RingParameters", "Message", 5, ["Close"], {}])
def test_another_kind_is_refused(kind: Any) -> None:
    """Only the kinds of messages are taken, not their parts, and that can be told from what is no message at all."""
    with pytest.raises(UnknownKind, match="not a known message"):
        decode(json.dumps({"version": VERSION, "kind": kind}).encode())


@pytest.mark.parametrize(
    "datagram",
    [b"", b"\0", b"\xff\xfe", b"null", b"1", b'"Close"', b"[]", b"{}", b"{", b'{"version": 2}', b"[" * 100_000],
    ids=["empty", "nul", "no utf-8", "null", "1", "text", "list", "nothing", "cut", "no kind", "deep"],
)
def test_what_is_no_message_is_refused(datagram: bytes) -> None:
    """Bytes of any other form raise ValueError, and nothing else."""
    with pytest.raises(ValueError, match=r"."):
        decode(datagram)


@pytest.mark.slow
def test_damaged_datagrams() -> None:
    """A datagram with some bytes altered is a message of right types still, or ValueError."""
    chance = random.Random(7)
    taken = 0
    for _ in range(5000):
        datagram = bytearray(encode(random_message(chance, chance.choice(KINDS))))
        for _ in range(chance.choice([1, 1, 3])):
            datagram[chance.randrange(len(datagram))] = chance.choice(b'0123456789"{}[],:ax\\-.e\xff')
        try:
            message = decode(bytes(datagram))
        except ValueError:
            continue
        taken += 1
        assert message == decode(encode(message))

    assert 100 < taken < 4000  # both outcomes were tried in earnest


def test_as_fields_is_plain() -> None:
    """The fields of a message, and of what it holds, are plain values."""
    message = messages.Connect("x86_64-abi", [RingParameters([1, 2], 3)], persistent=True)

    assert {
        "protocol": "x86_64-abi",
        "rings": [{"grefs": [1, 2], "event_channel": 3}],
        "persistent": True,
        "can_discard": True,
        "max_segments": 256,
        "goes_on": False,
    } == messages.as_fields(message)


def test_what_is_plain_can_be_restored() -> None:
    """What a worker left in the journal is a message again for its successor, and nothing else is."""
    message = messages.Connect("x86_64-abi", [RingParameters([1, 2], 3)], persistent=True, goes_on=True)

    assert message == messages.restore(messages.Connect, messages.as_fields(message))
    for wrong in ({}, {"protocol": 1}, [], None):
        with pytest.raises(ValueError, match="where a message has"):
            messages.restore(messages.Connect, wrong)


def test_a_message_of_a_large_connection_fits() -> None:
    """The longest message of normal use, eight queues of sixteen pages each, is far below the limit of a datagram."""
    rings = [RingParameters([2**32 - 1] * 16, 2**32 - 1) for _ in range(8)]

    assert len(encode(messages.Connect("x86_64-abi", rings, persistent=True))) < messages.MAX_MESSAGE // 8
