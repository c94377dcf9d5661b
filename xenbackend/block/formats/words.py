"""Tables of numbers in an image, which is big-endian or little-endian whatever the machine is.

Must not know what the numbers mean.
"""

from __future__ import annotations

import sys
from array import array
from typing import Literal

Order = Literal["big", "little"]


def unpack(kind: str, data: bytes, order: Order) -> array[int]:
    """Return the numbers of a table, as many as are whole; `kind` as `array` has it."""
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
