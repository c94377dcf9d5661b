"""Tables of numbers, in either order of bytes."""

from __future__ import annotations

import struct
from array import array

import pytest

from xenbackend.block.formats.words import Order, pack, unpack

SIGNS: dict[Order, str] = {"big": ">", "little": "<"}


@pytest.mark.parametrize("order", SIGNS)
@pytest.mark.parametrize("kind", ["H", "I", "Q"])
def test_both_orders(order: Order, kind: str) -> None:
    """Numbers are as `struct` has them; bytes that are no whole number are left out; a table is left as it was."""
    numbers = [1, 0x0203, 0xFFFE]
    data = struct.pack(f"{SIGNS[order]}3{kind}", *numbers)
    table = unpack(kind, data + b"\1", order)

    assert array(kind, numbers) == table
    assert data == pack(table, order)
    assert array(kind, numbers) == table
