"""xor: stores the disk with each byte changed by a key; an example of a third party's filter.

Synopsis:
    xor:[key=NUMBER]

Description:
    What is below looks like noise to whoever does not know the key. It is an example and no encryption.

Behaviour:
    Reads and writes are copied on their way. Flushes pass unchanged. Discards are refused, since a range that reads
    as zeros below would read as the key above.

Example:
    xor:key=90|ram:64M

Limits:
    A disk that was not written by this driver reads as the key where it holds zeros.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import Annotated

from xenbackend.block.driver import API, Env, Filter, Geometry
from xenbackend.block.options import Kind, option
from xenbackend.block.request import PENDING, Op, Request

KEY = 0xA5


def _key(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise ValueError(f"{text!r} is not a byte; write a number from 0 to 255")
    return int(text)


class Xor(Filter):
    """Changes every byte on its way down and on its way up."""

    name = "xor"

    @dataclass(frozen=True, slots=True)
    class Options:
        """What to change bytes by."""

        key: Annotated[int, Kind("byte", _key)] = option("the number that bytes are changed by", default=KEY)

    options: Options

    def open(self, env: Env) -> Geometry:
        """Prepare the table of bytes."""
        self._table = bytes(byte ^ self.options.key for byte in range(256))
        self._shadows: dict[Request, Request] = {}
        return replace(super().open(env), can_discard=False, discard_granularity=0)

    def submit(self, batch: list[Request]) -> None:
        """Pass on writes as changed copies, since their bytes belong to the guest."""
        refused = [request for request in batch if request.op == Op.DISCARD]
        passing = [self._changed(request) for request in batch if request.op != Op.DISCARD]
        if passing:
            super().submit(passing)
        if refused:
            for request in refused:
                request.status = errno.EOPNOTSUPP
            self.complete(refused)

    def on_complete(self, batch: list[Request]) -> None:
        """Change what was read, and give back the requests that the copies stood for."""
        done = []
        for request in batch:
            original = self._shadows.pop(request, request)
            original.status = request.status
            if original.op == Op.READ:
                for view in original.iov:
                    view[:] = bytes(view).translate(self._table)
            done.append(original)
        self.complete(done)

    def _changed(self, request: Request) -> Request:
        if request.op != Op.WRITE:
            return request
        shadow = Request()
        shadow.op, shadow.offset, shadow.length, shadow.status = request.op, request.offset, request.length, PENDING
        shadow.iov = [memoryview(bytearray(bytes(view).translate(self._table))) for view in request.iov]
        self._shadows[shadow] = request
        return shadow


class Future(Filter):
    """A driver that was written for a contract that does not exist yet."""

    name = "xor-future"
    api = API + 1
