"""Tables of numbers in either byte order."""

from __future__ import annotations

import struct
from array import array

import pytest

from xenbackend.block.formats.words import Order, pack, unpack

SIGNS: dict[Order, str] = {"big": ">", "little": "<"}


@pytest.mark.parametrize("order", SIGNS)
@pytest.mark.parametrize("kind", ["H", "I", "Q"])
def test_both_orders(order: Order, kind: str) -> None:
    """Numbers are encoded as by `struct`. A partial number at the end is ignored. Packing leaves the table as it is."""
    numbers = [1, 0x0203, 0xFFFE]
    data = struct.pack(f"{SIGNS[order]}3{kind}", *numbers)
    table = unpack(kind, data + b"\1", order)

    assert array(kind, numbers) == table
    assert data == pack(table, order)
    assert array(kind, numbers) == table
