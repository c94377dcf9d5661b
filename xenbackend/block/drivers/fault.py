"""fault: makes chosen requests fail, to test how a guest or a layer above copes with errors.

Synopsis:
    fault:[errno=NAME][,op=OPERATION][,range=START-END][,every=N][,rate=R][,skip=N][,limit=N][,seed=N]

Description:
    A request that fulfils all conditions ends with `errno`, and never reaches the layer below. Without any condition
    every request does.

Behaviour:
    `op` and `range` decide which requests match; a flush covers no bytes, so it matches no range. The first `skip`
    requests that match pass. Of the rest, the first one and every `every`-th one after it is due. A due request fails
    with the probability `rate`; the same `seed` chooses the same requests. After `limit` failures everything passes.

    The control verb `count` returns the number of requests that failed.

Example:
    fault:errno=ENOSPC,op=write,skip=1000,limit=1|aio:/img

Limits:
    The protocol with the guest distinguishes EOPNOTSUPP from other errors, but not those from one another.
    A failed flush never reaches the guest: instead the disk pauses until `xenbackend resume`, and no flush is answered.
    `fault:` without conditions does that at the first flush; with `op=write`, or any `range`, flushes pass.
"""

from __future__ import annotations

import errno as errno_module
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.options import Count, Errno, Fraction, Span, option
from xenbackend.block.request import Op, Request


class Fault(Filter):
    """Fails the requests that its options choose, and passes on the others."""

    name = "fault"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `fault:`."""

        errno: Errno = option("the error to give", default=errno_module.EIO)
        op: Literal["any", "read", "write", "flush", "discard"] = option("the operation that fails", default="any")
        range: Span | None = option("fail only requests that touch these bytes; the end is excluded", default=None)
        every: Count = option("fail one request in this many", default=1)
        rate: Fraction = option("probability that a request fails whose turn it is", default=1.0)
        skip: Count = option("let this many requests pass first", default=0)
        limit: Count = option("stop after this many failures; 0: never", default=0)
        seed: int = option("seed of the random numbers", default=0)

        def __post_init__(self) -> None:
            if self.every == 0:
                raise ValueError("option every: it must be 1 or more")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Start counting."""
        self._ops = {op.value for op in Op if self.options.op in ("any", op.name.lower())}
        self._seen = 0
        self._failed = 0
        self._random = Random(self.options.seed)
        return super().open(env)

    def submit(self, batch: list[Request]) -> None:
        """Pass on the requests that pass, and give back those that fail."""
        passing: list[Request] = []
        failing: list[Request] = []
        for request in batch:
            (failing if self._is_due(request) else passing).append(request)
        if passing:
            super().submit(passing)
        if failing:
            for request in failing:
                request.status = self.options.errno
            self.complete(failing)

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Return the number of requests that failed, for the verb `count`."""
        if verb != "count":
            return super().control(verb, arguments)
        return str(self._failed).encode()

    def _is_due(self, request: Request) -> bool:
        options = self.options
        if not self._matches(request) or (options.limit and self._failed >= options.limit):
            return False
        place = self._seen - options.skip
        self._seen += 1
        if place < 0 or place % options.every or self._random.random() >= options.rate:
            return False
        self._failed += 1
        return True

    def _matches(self, request: Request) -> bool:
        if request.op not in self._ops:
            return False
        if self.options.range is None:
            return True
        start, end = self.options.range
        return request.offset < end and start < request.offset + request.length
