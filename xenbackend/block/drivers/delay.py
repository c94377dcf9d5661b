"""delay: holds requests back for a while before it passes them on.

Synopsis:
    delay:[read=TIME][,write=TIME][,flush=TIME][,discard=TIME][,jitter=TIME][,seed=NUMBER]

Description:
    Makes a fast disk as slow as the one that a test or a demonstration needs.

Behaviour:
    Each request waits for the time of its operation, plus a random time of up to `jitter`, and then goes down. The
    waiting requests do not hold up each other, so with `jitter` they change their order. Operations without a time
    pass at once where there is no jitter. Errors pass unchanged.

Example:
    delay:read=5ms,write=10ms,jitter=2ms|aio:/img

Limits:
    Latency and not bandwidth is what it changes: any number of requests may wait at the same time. A detach waits for
    them, but gives up after 30 seconds and kills the worker: what still waits then is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.options import Duration, option
from xenbackend.block.request import Request
from xenbackend.units import format_duration

LONGEST_S = 3600.0  # our choice: no guest waits so long, and a timer must end before its number does


class Delay(Filter):
    """Passes requests on later."""

    name = "delay"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """How long each operation waits."""

        read: Duration = option("time that a read waits", default=0.0)
        write: Duration = option("time that a write waits", default=0.0)
        flush: Duration = option("time that a flush waits", default=0.0)
        discard: Duration = option("time that a discard waits", default=0.0)
        jitter: Duration = option("greatest random time on top", default=0.0)
        seed: int = option("start of the random numbers", default=0)

        def __post_init__(self) -> None:
            if max(self.read, self.write, self.flush, self.discard, self.jitter) > LONGEST_S:
                raise ValueError(f"nothing waits longer than {format_duration(LONGEST_S)} here")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Prepare the times by operation."""
        options = self.options
        self._times = (options.read, options.write, options.flush, options.discard)
        self._random = Random(options.seed)
        return super().open(env)

    def submit(self, batch: list[Request]) -> None:
        """Send each request down when its time has come; those of the same time stay one batch."""
        groups: dict[float, list[Request]] = {}
        for request in batch:
            wait = self._times[request.op] + self._random.random() * self.options.jitter
            groups.setdefault(wait, []).append(request)
        for wait, group in groups.items():
            if wait:
                self.env.call_later(wait, partial(super().submit, group))
            else:
                super().submit(group)
