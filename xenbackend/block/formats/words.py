"""Tables of numbers in an image, which are big-endian or little-endian independently of the machine.

Must not know what the numbers mean.
"""

from __future__ import annotations

import sys
from array import array
from typing import Literal

Order = Literal["big", "little"]


def unpack(kind: str, data: bytes, order: Order) -> array[int]:
    """Return the numbers of a table, without an incomplete last one; `kind` is a type code of `array`."""
    table: array[int] = array(kind)
    table.frombytes(data[: len(data) // table.itemsize * table.itemsize])
    if sys.byteorder != order:
        table.byteswap()
    return table


def pack(table: array[int], order: Order) -> bytes:
    """Return the bytes of a table, or of a slice of one."""
    if sys.byteorder != order:
        table = table[:]
        table.byteswap()
    return table.tobytes()
