"""Reads data of the layers below a filter while that filter is being opened.

Must not be used after the chain is open: it takes over the completions of every layer, which the chain wires later.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from xenbackend.block.driver import Driver, Env
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.wiring import wire_up
from xenbackend.units import SECTOR, round_up


def look(layers: Sequence[Driver], env: Env, offset: int, length: int) -> bytes:
    """Return `length` bytes at `offset` of the disk of `layers`, which are open; the top one is first.

    Both are in bytes, and need not be whole sectors. Raises: OSError with the status of the read.
    """
    back: list[Request] = []
    wire_up(layers, back.extend)
    start = offset // SECTOR * SECTOR
    request = Request()
    request.op, request.offset, request.status = Op.READ, start, PENDING
    request.length = round_up(offset + length, SECTOR) - start
    memory = allocate(request.length)
    request.iov = [memory]
    layers[0].submit([request])
    env.wait_for(lambda: bool(back))
    if request.status:
        raise OSError(request.status, os.strerror(request.status))
    found = bytes(memory[offset - start : offset - start + length])
    if len(found) < length:
        raise OSError(errno.EIO, "the layer below returned too few bytes")
    return found
