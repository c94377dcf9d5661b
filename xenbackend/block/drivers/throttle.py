"""throttle: lets so many requests and bytes through a second, and holds back what is more.

Synopsis:
    throttle:[iops=N][,iops_read=N][,iops_write=N][,bps=SIZE][,bps_read=SIZE][,bps_write=SIZE][,iops_burst=N]
        [,iops_read_burst=N][,iops_write_burst=N][,bps_burst=SIZE][,bps_read_burst=SIZE][,bps_write_burst=SIZE]
        [,burst=TIME][,size=SIZE][,group=NAME]

Description:
    Keeps one guest from taking a disk away from the others. `iops` limits requests, `bps` bytes, both a second, for
    reads and writes together; `iops_read` and its like limit one direction, alone or below the limit of both. A
    request passes where every limit that concerns it lets it.

    The meaning is that of QEMU's throttling (docs/throttle.txt there), which has `iops-total` for `iops`,
    `iops-total-max` for `iops_burst`, `iops-total-max-length` for `burst` and `iops-size` for `size`: each limit is a
    bucket that leaks at its rate. By default it holds what comes in 100 ms, so that a disk that was idle does that much
    at once. With a burst it holds what comes in `burst` seconds at the burst's rate: a disk that was idle does the
    rate of `iops_burst` for that long, and a little longer since the bucket leaks meanwhile.

    With `group` the limits are those of all disks that name this group, together: each has a share of them, and holds
    itself to that. Disks that are held back share alike; what one does not use goes to the others. The limits stand in
    each disk's chain, and should be the same there: a disk goes by its own.

    `valve`, the name of blktap's throttle, means this driver.

Behaviour:
    What is held back waits in two queues, reads and writes, so that a limit of one direction holds up the other one
    never. Each is served in the order of arrival, whatever ring it came by, and of both the one that came first goes
    first where both may go. A request that is larger than a bucket passes, and those behind it wait until its price
    is paid.

    A discard counts as a write request, and moves no bytes; QEMU counts its bytes. A flush counts as nothing and waits
    for nothing: it covers what was written before, and what is held back was not. Requests are counted as the guest
    sent them if this is the top layer, and after the layers above have cut them otherwise. With `size` a request
    counts as one for each `size` bytes of it that have begun.

    Orders do not wait for a limit: `pause`, `set`, `snapshot`, `resize`, `upgrade` and `detach` let everything pass
    that is held back, and it is charged: what comes afterwards waits longer. `set` with other numbers changes a limit
    while the guest runs. What the guest has used up is not forgotten when its worker dies, but it is when `set` alters
    this layer.

    `xenbackend status --json` shows how many requests are `waiting`, how many were `held` back ever, and for how many
    milliseconds in all (`held_ms`).

    The shares of a group are handed out by the service, once a second, by what each disk was held back and has used;
    they change in two steps, so that no more than the limits is handed out meanwhile. A disk that has just joined, or
    does nothing, has a small share at first. While no service runs the shares stay as they are. A worker that its guest
    has taken over gets no larger share by what it counts, and cannot take any from the others.

    `xenbackend status --json` shows the share besides, in millionths (`share_ppm`), and for how many milliseconds of
    the whole limit was let pass (`spent_ms`).

    Settings without effect are refused: a burst without its limit or not above it, `burst` without a burst, `size`
    without a limit of requests, `group` without a limit, a limit of one direction that is not below that of both.

Example:
    throttle:iops=500,bps=20M|aio:/srv/images/guest.img
    throttle:iops=500,iops_burst=2000,burst=60s,bps_write=50M|qcow2:/srv/images/guest.qcow2

Limits:
    Time is that of the worker's loop: a worker that sleeps for more than 100 ms after a limit has ended loses the rest.
    Put it above other filters: below one that caches writes it would limit the cache, and not the guest. A group is one
    service's, and one host's. It is fairness among guests that do not attack the host: a worker that was taken over
    does I/O as fast as it likes.

    Where nothing is held back it costs 0.2 us a request in batches of 32, 0.4 us in batches of 8, and 1.6 us for one
    alone; in a group 0.1 us more in batches of 32, and 0.7 us alone.
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

# QEMU, util/throttle.c: throttle_compute_wait. Without a burst a bucket holds a tenth of its rate
_SLACK_S = 0.1
_TICK_S = 1e-6  # what is due within it is due: a clock has only so many digits
_MOST = 10**15  # include/qemu/throttle.h, THROTTLE_VALUE_MAX
_LONGEST_S = 86400.0  # our choice, of a burst
_LEAST_SHARE = 1e-6  # and 1 is all
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WAYS = ("", "_read", "_write")  # both directions, or one: `_counts` has their requests, then their bytes


@dataclass(frozen=True, slots=True)
class _Limit:
    """A leaking bucket as a clock: it is empty at `empty_at`, which is memory number `place`.

    which  of `_counts`: what it counts
    cost   seconds that one unit takes to leak
    slack  seconds that it may be from being empty while something still passes
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

        iops: Count = option("requests a second; 0: any number, as of all limits", default=0)
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
        size: Size = option("bytes up to which a request counts as one, and more as several; 0: any", default=0)
        group: str = option("disks that share the limits: a name; none: they are this disk's alone", default="")

        def __post_init__(self) -> None:
            if self.group and not _NAME.fullmatch(self.group):
                raise ValueError(
                    f"{self.group!r} is no name of a group; it has 1 to 64 letters, digits and any of _ . -"
                )
            limits = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "group"}
            if self.group and not any(limits[kind + way] for kind in ("iops", "bps") for way in _WAYS):
                raise ValueError("group does nothing without a limit")
            if problem := _what_is_idle(limits):
                raise ValueError(problem)
            if 0 < self.burst < 1 or self.burst > _LONGEST_S:
                raise ValueError("burst must be between 1s and 86400s")
            if any(value > _MOST for value in limits.values()):
                raise ValueError(f"nothing may be more than {_MOST}")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Find what was used up by a predecessor."""
        geometry = super().open(env)
        limits = tuple(_limits_of(self.options, 1.0))
        self._empty_at = env.memory("buckets", max(8, 8 * len(limits))).cast("d")
        self._share = env.memory("share", 8).cast("d") if self.options.group else None
        self._spent_s = 0.0
        for place, at in enumerate(self._empty_at):  # a predecessor may have been taken over, and left anything
            if not 0 <= at <= env.now() + _MOST:
                self._empty_at[place] = 0.0
        if self._share is not None and not _LEAST_SHARE <= self._share[0] <= 1:
            self._share[0] = FIRST
        self._set_limits()
        self._held: tuple[deque[tuple[int, float, Request]], ...] = (deque(), deque())  # reads; writes and discards
        self._order = count()
        self._wakes_at = 0.0  # of the timer that is to come next; 0: none
        self._ever = 0
        self._waited_s = 0.0
        env.report("limits", _describe(self.options) or "none")
        if self.options.group:
            env.report("group", self.options.group)
        return geometry

    def _set_limits(self) -> None:
        """Go by this disk's share of the limits."""
        self._limits = tuple(_limits_of(self.options, self._share[0] if self._share is not None else 1.0))
        self._of_way = [[each for each in self._limits if each.which % 3 in (0, way)] for way in (1, 2)]

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Take the share of a group's limits, from the service: ``share 0.25``. Raises: DriverError."""
        if verb != "share" or self._share is None:
            return super().control(verb, arguments)
        try:
            share = float(*arguments)
        except (TypeError, ValueError):
            share = 0.0
        if not _LEAST_SHARE <= share <= 1:
            raise DriverError("a share is a number above 0, and 1 at most", layer=self.name, errno=errno.EINVAL)
        now, empty_at, former = self.env.now(), self._empty_at, self._share[0]
        for limit in self._limits if share > former else ():  # what is to be paid still is paid at the new rate
            empty_at[limit.place] = now + max(0.0, empty_at[limit.place] - now) * former / share
        self._share[0] = share
        self._set_limits()
        self._wake()
        return b""

    def submit(self, batch: list[Request]) -> None:
        """Pass the batch on where every limit allows all of it, else as much as they do."""
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
        """Pass on all that is held back, and charge it."""
        now = self.env.now()
        passing = [self._let_one_go(way, now) for way in (0, 1) for _ in range(len(self._held[way]))]
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
        """Let go of the memory."""
        self._empty_at.release()
        if self._share is not None:
            self._share.release()

    def _may_pass(self, batch: list[Request], now: float) -> bool:
        """Charge the whole batch, and return True; where a limit would hold anything back, charge nothing."""
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
        """Count what was let pass, in seconds of the whole limit that was nearest."""
        assert self._share is not None  # noqa: S101 - of a group
        self._spent_s += max(seconds, default=0.0) * self._share[0]

    def _take(self, now: float, passing: list[Request]) -> list[float]:
        """Add to `passing` what may go now; return for how many seconds each direction waits, 0: nothing is left."""
        waits = [0.0, 0.0]
        while ways := [way for way in (0, 1) if self._held[way] and not waits[way]]:
            way = min(ways, key=lambda each: self._held[each][0][0])
            wait = max(self._empty_at[each.place] - now - each.slack for each in self._of_way[way])
            if wait > _TICK_S:
                waits[way] = wait
            else:
                passing.append(self._let_one_go(way, now))
        return waits

    def _let_one_go(self, way: int, now: float) -> Request:
        """Charge what waits for longest in one direction, and return it."""
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
        """Pass on what may go by now, from a timer or because the limits are others."""
        self._wakes_at = 0.0
        if self._held[0] or self._held[1]:
            now = self.env.now()
            passing: list[Request] = []
            waits = self._take(now, passing)
            self._pass_on(passing, waits, now)


def _what_is_idle(limits: dict[str, Any]) -> str:
    """Return a sentence about an option that does nothing beside the others, empty: there is none."""
    bursts = {name: value for name, value in limits.items() if name.endswith("_burst") and value}
    for name, value in bursts.items():
        limit = name.removesuffix("_burst")
        if not limits[limit]:
            return f"{name} does nothing without {limit}"
        if value <= limits[limit]:
            return f"{name} is {value}; it must be more than {limit}, which is {limits[limit]}"
    if limits["burst"] and not bursts:
        return "burst does nothing without the rate of a burst, such as iops_burst"
    if limits["size"] and not any(limits["iops" + way] for way in _WAYS):
        return "size does nothing without iops, iops_read or iops_write"
    for kind in ("iops", "bps"):
        for name in (f"{kind}_read", f"{kind}_write"):
            if 0 < limits[kind] <= limits[name]:
                return f"{name} is {limits[name]}; it does nothing unless it is below {kind}"
    return ""


def _limits_of(options: Throttle.Options, share: float) -> Iterator[_Limit]:
    """Yield the buckets; a burst of more than a second has one of its own, which leaks at the burst's rate.

    All leak at their `share` of the rate, and hold as much less.
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
    """Return the limits for people."""
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
