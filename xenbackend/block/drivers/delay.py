"""delay: holds each request back for some time before passing it on.

Synopsis:
    delay:[read=TIME][,write=TIME][,flush=TIME][,discard=TIME][,jitter=TIME][,seed=NUMBER]

Description:
    Makes a fast disk as slow as a test or a demonstration needs it to be.

Behaviour:
    Each request waits for the time set for its operation, plus a random time of up to `jitter`, and is then passed on.
    Waiting requests do not hold up one another, so `jitter` changes their order. An operation without a time passes at
    once if there is no `jitter`. Errors pass unchanged.

Example:
    delay:read=5ms,write=10ms,jitter=2ms|aio:/img

Limits:
    It changes latency and not bandwidth: any number of requests may wait at the same time. A detach waits for them, but
    gives up after 30 seconds and kills the worker; requests that are still waiting then are lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.options import Duration, option
from xenbackend.block.request import Request
from xenbackend.units import format_duration

LONGEST_S = 3600.0  # our choice: no guest waits so long, and the time of a timer must be a finite number


class Delay(Filter):
    """Passes each request on after a delay."""

    name = "delay"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `delay:`."""

        read: Duration = option("how long a read waits", default=0.0)
        write: Duration = option("how long a write waits", default=0.0)
        flush: Duration = option("how long a flush waits", default=0.0)
        discard: Duration = option("how long a discard waits", default=0.0)
        jitter: Duration = option("longest random time to add to these", default=0.0)
        seed: int = option("seed of the random numbers", default=0)

        def __post_init__(self) -> None:
            if max(self.read, self.write, self.flush, self.discard, self.jitter) > LONGEST_S:
                raise ValueError(f"no request may wait longer than {format_duration(LONGEST_S)}")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Prepare a table of times by operation."""
        options = self.options
        self._times = (options.read, options.write, options.flush, options.discard)
        self._random = Random(options.seed)
        return super().open(env)

    def submit(self, batch: list[Request]) -> None:
        """Send each request down when its time has come; requests with the same delay stay in one batch."""
        groups: dict[float, list[Request]] = {}
        for request in batch:
            wait = self._times[request.op] + self._random.random() * self.options.jitter
            groups.setdefault(wait, []).append(request)
        for wait, group in groups.items():
            if wait:
                self.env.call_later(wait, partial(super().submit, group))
            else:
                super().submit(group)
