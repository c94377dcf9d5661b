"""Tests of `xenbackend.protocol.codec`: each message is decoded as it was, and nothing else is accepted."""

from __future__ import annotations

import json
import random
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from xenbackend.block.grammar import MAX_LAYERS
from xenbackend.block.opening import MAX_PARENTS
from xenbackend.protocol import codec, messages, opening
from xenbackend.protocol.codec import MAX_ITEMS, NotAMessage, as_fields, encode, restore
from xenbackend.protocol.messages import VERSION, RingParameters
from xenbackend.walls.raising import Wall

DECODERS = {
    messages.FromWorker: codec.from_worker,
    messages.FromSupervisor: codec.from_supervisor,
    opening.Question: opening.from_worker,
    opening.FromOpener: opening.from_opener,
    opening.FromSupervisor: opening.from_supervisor,
}
KINDS = [(kind, decode) for side, decode in DECODERS.items() for kind in get_args(side)]
LETTERS = 'az AZ09-_/\\"\n\0\x7f\u00e4\u20ac\U0001f4be\udc80'  # \udc80: a byte of a path that is no UTF-8
each_kind = pytest.mark.parametrize(
    ("kind", "decode"), KINDS, ids=[f"{kind.__name__}-{decode.__name__}" for kind, decode in KINDS]
)


def random_value(chance: random.Random, wanted: Any) -> Any:
    """Return a random value of an annotated type."""
    if isinstance(wanted, UnionType):
        return random_value(chance, chance.choice(get_args(wanted)))
    if wanted is type(None):
        return None
    if is_dataclass(wanted):
        return random_message(chance, wanted)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return chance.choice(list(wanted))
    if wanted is bool:
        return chance.random() < 0.5
    if wanted is int:
        return chance.choice([0, 1, -1, 2**31, 2**64 - 1, -(2**63), chance.getrandbits(40)])
    if wanted is str:
        return "".join(chance.choices(LETTERS, k=chance.randrange(30)))
    some = range(chance.randrange(4))
    inner = get_args(wanted)
    if get_origin(wanted) is dict:
        return {random_value(chance, str): random_value(chance, inner[1]) for _ in some}
    return [random_value(chance, inner[0]) for _ in some]


def random_message(chance: random.Random, kind: Any) -> Any:
    """Return a message of this kind with random content."""
    return kind(**{name: random_value(chance, wanted) for name, wanted in get_type_hints(kind).items()})


def plain(message: Any) -> dict[str, Any]:
    """Return the values in a message's datagram."""
    values: dict[str, Any] = json.loads(encode(message))
    return values


@each_kind
def test_round_trip(kind: Any, decode: Any) -> None:
    """A message of any content is the same after encoding and decoding, with the same types."""
    chance = random.Random(kind.__name__)
    for _ in range(100):
        message = random_message(chance, kind)

        assert message == decode(encode(message))


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS], ids=lambda kind: kind.__name__)
def test_each_side_is_told_what_it_may_be_told(kind: Any) -> None:
    """Each side accepts only the messages that the other side may send."""
    datagram = encode(random_message(random.Random(4), kind))
    for side, decode in DECODERS.items():
        if kind in get_args(side):
            assert kind is type(decode(datagram))
        else:
            with pytest.raises(NotAMessage):
                decode(datagram)


@each_kind
def test_a_message_needs_the_fields_that_have_no_default(kind: Any, decode: Any) -> None:
    """A datagram that lacks a field is refused, unless the field has a default."""
    message = random_message(random.Random(1), kind)
    for each in fields(kind):
        datagram = json.dumps({name: value for name, value in plain(message).items() if name != each.name}).encode()
        if each.default is MISSING and each.default_factory is MISSING:
            with pytest.raises(NotAMessage, match=f"{kind.__name__} without {each.name}"):
                decode(datagram)
        else:
            default = each.default if each.default is not MISSING else each.default_factory()
            assert replace(message, **{each.name: default}) == decode(datagram)


@each_kind
def test_a_field_that_is_not_known_is_refused(kind: Any, decode: Any) -> None:
    """A datagram with an unknown field is refused: it is not of our version."""
    values = plain(random_message(random.Random(3), kind))

    with pytest.raises(NotAMessage):
        decode(json.dumps({**values, "surprise": [1]}).encode())


@each_kind
def test_fields_have_their_types(kind: Any, decode: Any) -> None:
    """A field of another type is refused, so that no code needs to check what a worker says again."""
    message = random_message(random.Random(2), kind)
    values = plain(message)
    for name in get_type_hints(kind):
        for wrong in (None, 1.5, 2**64, -(2**63) - 1, True, "\ud800", [None], [[[1]]], {"a": [1]}, [{"grefs": [1]}]):
            try:
                decode(json.dumps({**values, name: wrong}).encode())
            except NotAMessage:
                continue
            assert wrong in (None, True)  # where a field may be None, or is a bool
            assert type(wrong) in (type(None), bool)
            assert wrong is not None or type(None) in get_args(get_type_hints(kind)[name])


def test_nothing_is_longer_than_its_bound() -> None:
    """A list with more than MAX_ITEMS items is refused, whatever they are."""
    values = plain(messages.Ask(1, messages.Command("log", "get", [])))

    def datagram(count: int) -> bytes:
        return json.dumps({**values, "question": {**values["question"], "arguments": ["x"] * count}}).encode()

    codec.from_worker(datagram(MAX_ITEMS))
    with pytest.raises(NotAMessage):
        codec.from_worker(datagram(MAX_ITEMS + 1))


@pytest.mark.parametrize(
    ("field", "most"),
    [("layers", 64), ("facts", 64), ("figures", 204), ("walls", 32), ("no_walls", 32), ("needs", 32)],
)
def test_a_standing_is_bounded_by_what_a_chain_can_have(field: str, most: int) -> None:
    """No field of a standing has more items than any chain of ours gives it: each costs the service time."""
    values = plain(messages.Standing(1, messages.Stage.OPEN, "x", read_only=False, shareable=False))
    layer = as_fields(messages.LayerFacts("x", 1, 512, False, False, False, 0, 0, 512))

    def datagram(count: int) -> bytes:
        if field == "layers":
            changed = {**values, "layers": [layer] * count}
        else:
            names = [str(number) for number in range(count)]
            content = dict.fromkeys(names, "") if field in ("facts", "no_walls") else names
            inside = field in layer
            changed = {**values, "layers": [{**layer, field: content}]} if inside else {**values, field: content}
        return json.dumps(changed).encode()

    codec.from_worker(datagram(most))
    with pytest.raises(NotAMessage, match=f"with {most + 1} {field}, of at most {most}"):
        codec.from_worker(datagram(most + 1))


def test_a_standing_has_room_for_any_chain() -> None:
    """A chain may have as many layers, and its source as many parents, as a standing has room for."""
    assert MAX_LAYERS + MAX_PARENTS == messages.MAX_LAYERS
    assert len(Wall) <= messages.MAX_WALLS


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, str(VERSION), True, float(VERSION), [VERSION]])
def test_another_version_is_refused(version: Any) -> None:
    """Only messages of exactly our version are accepted."""
    values = {**plain(messages.Close(1)), "version": version}
    with pytest.raises(NotAMessage, match="version"):
        codec.from_supervisor(json.dumps(values).encode())


@pytest.mark.parametrize("kind", [None, "", "close", "LayerFacts", "RingParameters", "Pause", 5, ["Close"], {}])
def test_another_kind_is_refused(kind: Any) -> None:
    """Only kinds of messages are accepted, and not their parts."""
    with pytest.raises(NotAMessage):
        codec.from_supervisor(json.dumps({"version": VERSION, "kind": kind, "number": 1}).encode())


@pytest.mark.parametrize(
    "datagram",
    [
        b"", b"\0", b"\xff\xfe", b"null", b"1", b'"Close"', b"[]", b"{}", b"{", b'{"version": 3}', b"[" * 100_000,
        b'{"version": 3, "kind": "Drop", "name": NaN}', b"1" * 10_000,
    ],
    ids=["empty", "nul", "no utf-8", "null", "1", "text", "list", "nothing", "cut", "no kind", "deep", "NaN", "long"],
)  # fmt: skip
def test_what_is_no_message_is_refused(datagram: bytes) -> None:
    """Bytes that are not a message raise NotAMessage, and nothing else."""
    for decode in DECODERS.values():
        with pytest.raises(NotAMessage):
            decode(datagram)


def test_what_is_prepared_is_looked_up_no_more() -> None:
    """After `prepare`, no message makes the codec look up fields of a class."""
    codec._fields_of.cache_clear()
    codec.prepare(*DECODERS)
    prepared = codec._fields_of.cache_info().misses
    chance = random.Random(11)
    for kind, decode in KINDS:
        decode(encode(random_message(chance, kind)))

    assert prepared == codec._fields_of.cache_info().misses >= len(KINDS)


@pytest.mark.slow
def test_damaged_datagrams() -> None:
    """A datagram with some bytes changed either is still a valid message, or raises NotAMessage."""
    chance = random.Random(7)
    taken = 0
    for _ in range(5000):
        kind, decode = chance.choice(KINDS)
        datagram = bytearray(encode(random_message(chance, kind)))
        for _ in range(chance.choice([1, 1, 3])):
            datagram[chance.randrange(len(datagram))] = chance.choice(b'0123456789"{}[],:ax\\-.e\xff')
        try:
            message = decode(bytes(datagram))
        except NotAMessage:
            continue
        taken += 1
        assert message == decode(encode(message))

    assert 100 < taken < 4000  # both outcomes were frequent


def test_what_is_plain_can_be_restored() -> None:
    """A record that was stored as plain values is restored unchanged, and anything else raises NotAMessage."""
    connect = messages.Connect("x86_64-abi", [RingParameters([1, 2], 3)], persistent=True, goes_on=True)
    values = as_fields(connect)

    assert {"grefs": [1, 2], "event_channel": 3} == values["rings"][0]
    assert connect == restore(messages.Connect, values) == restore(messages.Connect, json.loads(json.dumps(values)))
    for wrong in ({}, {"protocol": 1}, [], None, 5, [1]):
        with pytest.raises(NotAMessage):
            restore(messages.Connect, wrong)


def test_a_message_of_a_large_connection_fits() -> None:
    """The longest message of normal use, eight queues of sixteen pages each, is far below the limit of a datagram."""
    rings = [RingParameters([2**32 - 1] * 16, 2**32 - 1) for _ in range(8)]
    message = messages.Serve(1, messages.Connect("x86_64-abi", rings, persistent=True))

    assert len(encode(message)) < messages.MAX_MESSAGE // 8
