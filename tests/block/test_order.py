"""Remarks about the order of layers."""

from __future__ import annotations

import pytest

from xenbackend.block import order
from xenbackend.block.drivers import find_driver
from xenbackend.block.order import remarks, words_of
from xenbackend.block.spec import parse_chain


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ("throttle cow aio", []),
        ("cow throttle aio", ["throttle below cow limits only what is read"]),
        ("cow delay throttle log qcow2", ["throttle below cow", "log below cow sees no write"]),
        ("log throttle cow partition aio", []),
        ("throttle delay throttle ram", ["two throttles follow each other"]),
        ("offset offset aio", ["two offsets follow each other"]),
        ("offset log offset aio", []),
        ("readahead log throttle aio", ["throttle below readahead"]),
        ("cow delay luks aio", ["cow above luks keeps what the guest writes in its file as plain text"]),
        ("luks cow aio", []),
        ("luks log readahead nbd", ["readahead below luks holds what is still encrypted"]),
        ("luks luks aio", ["luks above luks encrypts twice"]),
        ("cache luks aio", ["cache above luks keeps plain text"]),
        ("cache throttle aio", ["throttle below cache limits only what the cache has not"]),
        ("throttle cache cache aio", ["cache above cache keeps everything twice"]),
        ("luks cache aio", []),
        ("checksum log readahead nbd", ["readahead below checksum holds what is not verified yet"]),
        ("cow cow null", ["null below cow reads as zeros"]),
    ],
)
def test_an_order_that_makes_no_sense_is_remarked(chain: str, words: list[str]) -> None:
    """Each order that makes no sense has one remark, wherever it stands in the chain. Sensible orders have none."""
    found = remarks(chain.split())

    assert len(words) == len(found), found
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_the_table_names_drivers() -> None:
    """Each row of the table names two existing drivers, of which the upper one is a filter."""
    for upper, lower in [*order._BELOW, *order._NEXT]:
        assert find_driver(upper.partition(" ")[0]).is_filter
        assert find_driver(lower).name == lower


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (
            "writeback",
            ["throttle below a cache with mode=writeback limits what the cache has not", "log below a cache"],
        ),
        ("read", ["throttle below cache limits only what the cache has not"]),
    ],
)
def test_a_mode_makes_another_layer_of_it(mode: str, words: list[str]) -> None:
    """A cache with mode=writeback has remarks of its own, because layers below it see and limit writes only later."""
    layers = parse_chain(f"cache:/c,size=1M,mode={mode}|throttle:iops=5|log:|ram:1M").layers
    found = remarks(words_of(layers))

    assert len(words) == len(found), found
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
