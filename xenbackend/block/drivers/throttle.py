"""throttle: limits the requests and bytes a second, and holds back what exceeds the limits.

Synopsis:
    throttle:[iops=N][,iops_read=N][,iops_write=N][,bps=SIZE][,bps_read=SIZE][,bps_write=SIZE][,iops_burst=N]
        [,iops_read_burst=N][,iops_write_burst=N][,bps_burst=SIZE][,bps_read_burst=SIZE][,bps_write_burst=SIZE]
        [,burst=TIME][,size=SIZE][,group=NAME]

Description:
    Keeps one guest from using up a medium that others share. `iops` limits requests, `bps` bytes, each a second and for
    reads and writes together; `iops_read` and the like limit one direction, alone or within the limit for both. A
    request passes when all limits that apply to it allow it.

    The limits work as in QEMU's throttling (docs/throttle.txt there), where the options have other names: `iops-total`
    for `iops`, `iops-total-max` for `iops_burst`, `iops-total-max-length` for `burst`, `iops-size` for `size`. Each
    limit is a bucket that leaks at its rate. By default it holds what comes in 100 ms, so a disk that was idle may do
    that much at once. With a burst it holds what comes in `burst` seconds at the rate of the burst: a disk that was
    idle does `iops_burst` for that long, and a little longer since the bucket leaks meanwhile.

    With `group` the limits apply to all disks that name this group, together: each of them has a share, and keeps to
    it. Disks that are held back get equal shares; what a disk does not use goes to the others. The limits are written
    in the chain of each disk, and should be the same there, since a disk goes by its own.

    `valve`, the name of blktap's throttle, is an alias of this driver.

Behaviour:
    Requests that are held back wait in two queues, one for reads and one for writes, so a limit on one direction never
    delays the other. Each queue is served in the order of arrival, from whichever ring the requests came; if both
    queues may go on, the older request goes first. A request that is larger than a bucket passes, and those behind it
    wait until its cost is paid.

    A discard counts as a write of no bytes; QEMU counts its bytes. A flush does not count, and does not wait: it
    covers what was written before, and requests that are held back were not. If this is the top layer, requests are
    counted as the guest sent them, else as the layers above have split them. With `size` a request counts once for
    each `size` bytes, or part of them, that it has.

    Orders do not wait for a limit: `pause`, `set`, `snapshot`, `resize`, `upgrade` and `detach` let everything pass
    that is held back. It still counts: what comes afterwards waits longer. `set` with other numbers changes a limit
    while the guest runs. What a guest has used up is remembered when its worker dies, and forgotten when `set` changes
    this layer.

    `xenbackend status --json` shows how many requests are `waiting`, how many were ever `held` back, and for how many
    milliseconds in all (`held_ms`).

    The service computes the shares of a group once a second, from how much each disk was held back and has used. A
    share is lowered one step before another one is raised, so that the shares never exceed the limits together. A disk
    that has just joined, or does nothing, has a small share at first. While no service runs, the shares stay as they
    are. If a guest takes over its worker, false figures get it no more than a disk that is held back, and take nothing
    from the fair shares of the others.

    For a disk in a group `status --json` also shows the share, in millionths (`share_ppm`), and for how many
    milliseconds' worth of the whole limit it was let pass (`spent_ms`).

    Options without effect are refused: a burst without its limit or not above it, `burst` without a burst, `size`
    without a limit on requests, `group` without a limit, and a limit on one direction that is not below that for both.

Example:
    throttle:iops=500,bps=20M|aio:/srv/images/guest.img
    throttle:iops=500,iops_burst=2000,burst=60s,bps_write=50M|qcow2:/srv/images/guest.qcow2

Limits:
    Time is measured in the worker's loop: if the worker sleeps for more than 100 ms after a limit has ended, it loses
    the rest. Put the layer above other filters: below one that caches writes it would limit the cache, and not the
    guest. A group belongs to one service, and so to one host. It is for fairness among guests that do not attack the
    host: a worker that was taken over does as much I/O as it likes.

    If nothing is held back it costs 0.2 us a request in batches of 32, 0.4 us in batches of 8, and 1.6 us for one
    alone; in a group 0.1 us more in batches of 32, and 0.7 us more alone.
"""

from __future__ import annotations

import errno
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.options import Count, Duration, Size, option
from xenbackend.block.request import Op, Request
from xenbackend.block.shares import FIRST
from xenbackend.errors import DriverError
from xenbackend.units import format_size

# QEMU, util/throttle.c: throttle_compute_wait. Without a burst a bucket holds a tenth of a second's worth
_SLACK_S = 0.1
_TICK_S = 1e-6  # a request that is due within this time is due now: floating point numbers are not exact
_MOST = 10**15  # include/qemu/throttle.h, THROTTLE_VALUE_MAX
_LONGEST_S = 86400.0  # the longest burst: our choice
_LEAST_SHARE = 1e-6  # of the whole limit, which is 1
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WAYS = ("", "_read", "_write")  # both directions, or one; counts have their requests, then their bytes


@dataclass(frozen=True, slots=True)
class _Limit:
    """A leaking bucket, as the time when it will be empty.

    place  where that time is in `_empty_at`, the memory
    which  what it counts: 0 to 2 for requests, 3 to 5 for bytes; in each case of all, of reads, of writes
    cost   seconds that one unit takes to leak
    slack  how many seconds before it is empty requests may pass
    """

    place: int
    which: int
    cost: float
    slack: float


class Throttle(Filter):
    """See the head of this file."""

    name = "throttle"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `throttle:`."""

        iops: Count = option("requests a second; 0: no limit, here and below", default=0)
        iops_read: Count = option("reads a second", default=0)
        iops_write: Count = option("writes and discards a second", default=0)
        bps: Size = option("bytes a second", default=0)
        bps_read: Size = option("bytes read a second", default=0)
        bps_write: Size = option("bytes written a second", default=0)
        iops_burst: Count = option("requests a second during a burst", default=0)
        iops_read_burst: Count = option("reads a second during a burst", default=0)
        iops_write_burst: Count = option("writes and discards a second during a burst", default=0)
        bps_burst: Size = option("bytes a second during a burst", default=0)
        bps_read_burst: Size = option("bytes read a second during a burst", default=0)
        bps_write_burst: Size = option("bytes written a second during a burst", default=0)
        burst: Duration = option("how long a burst may last; 0: 1s", default=0.0)
        size: Size = option(
            "bytes that count as one request, so that larger ones count several times; 0: no limit", default=0
        )
        group: str = option(
            "name of the group of disks that share the limits; none: the limits are this disk's alone", default=""
        )

        def __post_init__(self) -> None:
            if self.group and not _NAME.fullmatch(self.group):
                raise ValueError(
                    f"{self.group!r} is not a name for a group; use 1 to 64 letters, digits and any of _ . -"
                )
            limits = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "group"}
            if self.group and not any(limits[kind + way] for kind in ("iops", "bps") for way in _WAYS):
                raise ValueError("group has no effect without a limit")
            if problem := _what_is_idle(limits):
                raise ValueError(problem)
            if 0 < self.burst < 1 or self.burst > _LONGEST_S:
                raise ValueError("burst must be between 1s and 86400s")
            if any(value > _MOST for value in limits.values()):
                raise ValueError(f"no limit may be more than {_MOST}")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Continue with what was used up through a predecessor."""
        geometry = super().open(env)
        limits = tuple(_limits_of(self.options, 1.0))
        self._empty_at = env.memory("buckets", max(8, 8 * len(limits))).cast("d")
        self._share = env.memory("share", 8).cast("d") if self.options.group else None
        self._spent_s = 0.0
        for place, at in enumerate(self._empty_at):  # a predecessor that a guest took over may have left anything
            if not 0 <= at <= env.now() + _MOST:
                self._empty_at[place] = 0.0
        if self._share is not None and not _LEAST_SHARE <= self._share[0] <= 1:
            self._share[0] = FIRST
        self._set_limits()
        self._held: tuple[deque[tuple[int, float, Request]], ...] = (deque(), deque())  # reads; writes and discards
        self._order = count()
        self._wakes_at = 0.0  # when the next timer is due; 0: there is none
        self._ever = 0
        self._waited_s = 0.0
        env.report("limits", _describe(self.options) or "none")
        if self.options.group:
            env.report("group", self.options.group)
        return geometry

    def _set_limits(self) -> None:
        """Compute the limits from this disk's share of them."""
        self._limits = tuple(_limits_of(self.options, self._share[0] if self._share is not None else 1.0))
        self._of_way = [[each for each in self._limits if each.which % 3 in (0, way)] for way in (1, 2)]

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Take this disk's share of the group's limits from the service: ``share 0.25``. Raises: DriverError."""
        if verb != "share" or self._share is None:
            return super().control(verb, arguments)
        try:
            share = float(*arguments)
        except (TypeError, ValueError):
            share = 0.0
        if not _LEAST_SHARE <= share <= 1:
            raise DriverError("a share must be a number above 0, and at most 1", layer=self.name, errno=errno.EINVAL)
        now, empty_at, former = self.env.now(), self._empty_at, self._share[0]
        for limit in self._limits if share > former else ():  # the remaining debt is paid at the new rate
            empty_at[limit.place] = now + max(0.0, empty_at[limit.place] - now) * former / share
        self._share[0] = share
        self._set_limits()
        self._wake()
        return b""

    def submit(self, batch: list[Request]) -> None:
        """Pass on the whole batch if all limits allow it, else as many requests as they allow."""
        now = self.env.now()
        if not (self._held[0] or self._held[1]) and self._may_pass(batch, now):
            self.next.submit(batch)  # type: ignore[union-attr]  # a filter in a chain has a layer below
            return
        passing: list[Request] = []
        new = [0, 0]
        for request in batch:
            if request.op == Op.FLUSH:
                passing.append(request)
            else:
                way = int(request.op != Op.READ)
                self._held[way].append((next(self._order), now, request))
                new[way] += 1
        waits = self._take(now, passing)
        self._ever += sum(map(min, new, map(len, self._held)))
        self._pass_on(passing, waits, now)

    def release(self) -> None:
        """Pass on all requests that are held back, and charge them."""
        now = self.env.now()
        passing = [self._take_oldest(way, now) for way in (0, 1) for _ in range(len(self._held[way]))]
        if passing:
            self.next.submit(passing)  # type: ignore[union-attr]  # as in `submit`

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        counted = {
            "waiting": sum(map(len, self._held)),
            "held": self._ever,
            "held_ms": round(self._waited_s * 1000),
        }
        if self._share is not None:
            counted |= {"spent_ms": round(self._spent_s * 1000), "share_ppm": round(self._share[0] * 1e6)}
        return counted

    def close(self) -> None:
        """Release the memory."""
        self._empty_at.release()
        if self._share is not None:
            self._share.release()

    def _may_pass(self, batch: list[Request], now: float) -> bool:
        """Charge the whole batch, return True; if a limit would hold any of it back, charge nothing, return False."""
        if not self._limits:
            return True
        reads = writes = read_bytes = written_bytes = 0
        step = self.options.size
        for request in batch:
            op, length = request.op, request.length
            if op == 0:
                reads += -(-length // step) if step else 1
                read_bytes += length
            elif op == 1:
                writes += -(-length // step) if step else 1
                written_bytes += length
            elif op != 2:
                writes += 1
        counts = (reads + writes, reads, writes, read_bytes + written_bytes, read_bytes, written_bytes)
        empty_at = self._empty_at
        charged = []
        for limit in self._limits:
            at = max(empty_at[limit.place], now)
            at += counts[limit.which] * limit.cost
            if at - now > limit.slack:
                return False
            charged.append(at)
        for place, at in enumerate(charged):
            empty_at[place] = at
        if self._share is not None:
            self._spend([counts[limit.which] * limit.cost for limit in self._limits])
        return True

    def _spend(self, seconds: list[float]) -> None:
        """Count what was let pass, in seconds of the whole of the limit that it uses most."""
        assert self._share is not None  # noqa: S101 - called for disks in a group only
        self._spent_s += max(seconds, default=0.0) * self._share[0]

    def _take(self, now: float, passing: list[Request]) -> list[float]:
        """Append to `passing` what may go now; return the seconds that each direction has to wait, 0 if it is empty."""
        waits = [0.0, 0.0]
        while ways := [way for way in (0, 1) if self._held[way] and not waits[way]]:
            way = min(ways, key=lambda each: self._held[each][0][0])
            wait = max(self._empty_at[each.place] - now - each.slack for each in self._of_way[way])
            if wait > _TICK_S:
                waits[way] = wait
            else:
                passing.append(self._take_oldest(way, now))
        return waits

    def _take_oldest(self, way: int, now: float) -> Request:
        """Take the oldest request out of one direction's queue, charge it, and return it."""
        _, since, request = self._held[way].popleft()
        self._waited_s += now - since
        empty_at, step = self._empty_at, self.options.size
        units = -(-request.length // step) if step and request.op != Op.DISCARD else 1
        amounts = (units, request.length if request.op != Op.DISCARD else 0)
        for limit in self._of_way[way]:
            empty_at[limit.place] = max(empty_at[limit.place], now) + amounts[limit.which // 3] * limit.cost
        if self._share is not None:
            self._spend([amounts[limit.which // 3] * limit.cost for limit in self._of_way[way]])
        return request

    def _pass_on(self, passing: list[Request], waits: list[float], now: float) -> None:
        if due := [wait for wait in waits if wait]:
            wakes_at = now + min(due)
            if not self._wakes_at or wakes_at < self._wakes_at:
                self._wakes_at = wakes_at
                self.env.call_later(min(due), self._wake)
        if passing:
            self.next.submit(passing)  # type: ignore[union-attr]  # as in `submit`

    def _wake(self) -> None:
        """Pass on the requests that may go now. Called by a timer, and when the limits have changed."""
        self._wakes_at = 0.0
        if self._held[0] or self._held[1]:
            now = self.env.now()
            passing: list[Request] = []
            waits = self._take(now, passing)
            self._pass_on(passing, waits, now)


def _what_is_idle(limits: dict[str, Any]) -> str:
    """Return a sentence about an option that has no effect with the others, or an empty text."""
    bursts = {name: value for name, value in limits.items() if name.endswith("_burst") and value}
    for name, value in bursts.items():
        limit = name.removesuffix("_burst")
        if not limits[limit]:
            return f"{name} has no effect without {limit}"
        if value <= limits[limit]:
            return f"{name} is {value}; it must be more than {limit}={limits[limit]}"
    if limits["burst"] and not bursts:
        return "burst has no effect without the rate of a burst, such as iops_burst"
    if limits["size"] and not any(limits["iops" + way] for way in _WAYS):
        return "size has no effect without iops, iops_read or iops_write"
    for kind in ("iops", "bps"):
        for name in (f"{kind}_read", f"{kind}_write"):
            if 0 < limits[kind] <= limits[name]:
                return f"{name} is {limits[name]}; it has no effect unless it is below {kind}"
    return ""


def _limits_of(options: Throttle.Options, share: float) -> Iterator[_Limit]:
    """Yield the buckets; a burst of more than a second adds one of its own, which leaks at the burst's rate.

    All of them leak at `share` times their rate, and hold correspondingly less.
    """
    place = count()
    for number, kind in enumerate(("iops", "bps")):
        for way, suffix in enumerate(_WAYS):
            rate, burst = getattr(options, kind + suffix), getattr(options, f"{kind}{suffix}_burst")
            if not rate:
                continue
            which, length_s = 3 * number + way, options.burst or 1.0
            yield _Limit(next(place), which, 1 / (rate * share), burst * length_s / rate if burst else _SLACK_S)
            if burst and length_s > 1:
                yield _Limit(next(place), which, 1 / (burst * share), _SLACK_S)


def _describe(options: Throttle.Options) -> str:
    """Return a description of the limits for people."""
    words = {"iops": "requests", "bps": "bytes"}
    found = []
    for kind, way in ((kind, way) for kind in words for way in _WAYS):
        rate, burst = getattr(options, kind + way), getattr(options, f"{kind}{way}_burst")
        if rate:
            show = format_size if kind == "bps" else str
            more = f", {show(burst)} for {options.burst or 1:g} s" if burst else ""
            what = {"": "", "_read": " read", "_write": " write"}[way]
            found.append(f"{show(rate)}{f' {words[kind]}' * (kind == 'iops')}{what} a second{more}")
    return "; ".join(found)
