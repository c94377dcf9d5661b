"""log: tracks which ranges are written; with a file, records every request.

Synopsis:
    log:[FILE][,limit=SIZE][,track=on|off][,granularity=SIZE]
    log:[limit=SIZE][,track=on|off][,granularity=SIZE]

Description:
    Remembers which ranges of the disk were written or discarded, so that a copy of the disk can follow it: copy
    everything once, then again and again the ranges that `xenbackend log get` prints, until little enough is left. The
    layers below need no support for it.

    With FILE, every request also leaves a 32-byte record there: when it was submitted, its operation and sectors, its
    result and how long it took. `xenbackend log show FILE` prints the records, filters them and sums them up.

Behaviour:
    Tracking begins when the disk is opened, unless `track=off`. A range is marked before its request goes on to the
    layer below, so a crash leaves too many marks at most, never one too few. A request that fails stays marked, since
    nobody knows what it left on the medium. A request that is in flight while `get` returns its range, or while `start`
    or `clear` begin with an empty map, may reach the medium after somebody has copied that range: the range is marked
    again, for the next sweep. So begin the last sweep, which must find all that is left, when the guest is paused
    and nothing is in flight.

    The map is in memory that the service keeps. It survives the end of the worker, and also a crash or restart of the
    service if systemd or `xenbackend run --keep` started that. It ends with the vbd, when this layer is removed
    from the chain, and when the service is stopped. If the disk is used again after that, the new map marks
    everything as dirty, so that no write is ever missing.

    Reads, flushes and all errors pass through. Without FILE this layer does not look at completions at all: it
    remembers which requests it passed on, and checks those when a verb needs to know what is in flight.

    `xenbackend log VERB VBD` knows:

    `start`   starts tracking, with an empty map if tracking was off
    `stop`    stops tracking; the dirty ranges are kept
    `peek`    prints the dirty ranges
    `get`     prints the dirty ranges and forgets them, without losing a write in between
    `clear`   forgets the dirty ranges
    `status`  prints whether tracking is on, and an upper bound of what is dirty

    On the control socket a reply to `peek` and `get` is one page: lines of `FIRST_SECTOR COUNT` in sectors of
    512 bytes, then `more X` or `end`. After `more X` the same verb with the argument X returns the next page. With
    `get`, asking for the next page acknowledges the last one: only then are its ranges forgotten for good. If a
    reader dies before that, the next `get` without an argument returns the ranges of that page again, together with
    what was written since. A second reader that begins a sweep takes it away from the first one, whose next request is
    refused. `peek` also shows ranges that are not acknowledged yet; its pages are not of one moment. A range may be cut
    at the end of a page.

    Records are buffered, and written by a thread when 64 KiB have gathered, after a second, and when the disk is
    closed. If the worker dies, the records of the last second and of requests in flight are lost; the next worker
    overwrites a record that was cut short, and continues the same file with a record that says when it began.
    No error of the file ever reaches the guest: records that the file does not accept (no space left), or not in time,
    are dropped and counted. `status` says how many and why, and the file itself does as soon as it can be written to
    again.

    When the file reaches `limit=` bytes, its content is moved to FILE.1, and it begins anew: together they take at most
    twice the limit.

Example:
    log:|aio:/srv/images/guest.img
    log:/var/log/guest.rec,limit=16M|aio:/srv/images/guest.img

Limits:
    The map takes up to 256 MiB of the host's memory per TiB of disk with pieces of 512 bytes, but only for the parts
    that were written: 4 KiB for 16 MiB. `granularity=4K` takes an eighth of that, and marks 4 KiB for a write of 512
    bytes. The map never takes more than 257 MiB: a disk of more than 1 TiB is tracked in larger pieces (1 KiB up to
    2 TiB, 1 MiB up to 2 PiB), whatever `granularity` says; `xenbackend log status` shows their size. Parts that are
    written or discarded as a whole take no memory. `status` counts dirty bytes in steps of 8192 times the granularity.
    A record holds at most 2 TiB of sectors: a discard of more shows as that much. Two disks must not share one FILE.
    FILE must not be a symbolic link. FILE and FILE.1 are created if they do not exist whenever the chain is opened,
    except by `xenbackend check`, `set --dry-run` and a `set` that is refused. A request that a bug of a layer below has
    lost counts as in flight until the worker ends.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

from xenbackend.block import record
from xenbackend.block.dirty import DirtyMap, Range, StalePageError, fitting, memory_size
from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.options import RecordPath, Size, option
from xenbackend.block.recorder import MIN_LIMIT, Recorder
from xenbackend.block.request import PENDING, Request
from xenbackend.errors import DriverError
from xenbackend.units import SECTOR, format_size

_PASSED = 8192  # remembered requests after which those that came back are removed: twice 8 rings of 512 slots


class Log(Filter):
    """See the head of this file."""

    name = "log"
    is_transparent = True
    reading = frozenset({"status", "peek", "get"})

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `log:`."""

        record: RecordPath = option(
            "file that records every request; none: writes are only tracked", default="", target=True
        )
        limit: Size = option("bytes after which a new file is begun", default=64 << 20)
        track: bool = option("track writes from the beginning", default=True)
        granularity: Size = option("track ranges of at least this many bytes, a power of two", default=512)

        def __post_init__(self) -> None:
            if self.granularity < SECTOR or self.granularity & (self.granularity - 1):
                raise ValueError(f"granularity is {format_size(self.granularity)}; it must be 512, 1K, 2K, 4K ...")
            if self.limit < MIN_LIMIT:
                raise ValueError(f"limit is {format_size(self.limit)}; it must be {format_size(MIN_LIMIT)} or more")

    options: Options

    def open(self, env: Env) -> Geometry:
        """Find the predecessor's map or begin one, and open the file. Raises: DriverError, OSError."""
        geometry = super().open(env)
        options = self.options
        granularity = fitting(geometry.size, options.granularity)
        memory = env.memory("dirty", memory_size(geometry.size, granularity))
        self._dirty = DirtyMap(memory, geometry.size, granularity, is_tracking=options.track)
        self._is_tracking = self._dirty.is_tracking
        self._passed: set[Request] = set()  # contains all writes and discards in flight; requests are reused
        self._most_passed = _PASSED
        if self._dirty.is_fresh and env.resumes and self._is_tracking:
            self._dirty.mark(0, geometry.size)  # nobody knows any more what was written before
        env.report("tracking", "on" if self._is_tracking else "off")
        self._recorder: Recorder | None = None
        if options.record:
            self._open_record(geometry)
        return geometry

    def _open_record(self, geometry: Geometry) -> None:
        began_ns = time.time_ns()
        self._epoch_ns = began_ns - self._now_ns()
        self._started_ns: dict[Request, int] = {}
        session = record.Session(geometry.size, began_ns, geometry.sector_size, os.getpid())
        path, limit = self.options.record, self.options.limit
        self._recorder = Recorder(self.env, path, limit, record.pack_session(session), self._wall_ns)
        self.on_complete = self._record
        self.env.report("record", path)

    def submit(self, batch: list[Request]) -> None:
        """Mark the ranges that the batch will change, then pass it on."""
        if not self._is_tracking or self._dirty.mark_changes(batch):
            self._passed.update(batch)
            if len(self._passed) > self._most_passed:
                self._forget_returned()
        if self._recorder is not None:
            self._started_ns.update(dict.fromkeys(batch, self._now_ns()))
        self.next.submit(batch)  # type: ignore[union-attr]  # a filter has a layer below

    def _forget_returned(self) -> None:
        self._passed = {request for request in self._passed if request.status == PENDING}
        self._most_passed = max(_PASSED, 2 * len(self._passed))  # a layer above may split requests into many

    def _in_flight(self) -> list[Range]:
        """Return the ranges of the writes and discards that are in flight."""
        self._forget_returned()
        return [Range(request.offset, request.length) for request in self._passed if request.op & 1]

    def _record(self, batch: list[Request]) -> None:
        """Leave a record of each request, then give the batch back."""
        now_ns, epoch_ns = self._now_ns(), self._epoch_ns
        pop, pack, most = self._started_ns.pop, record.REQUEST.pack, record.MAX_COUNT
        records = []
        for request in batch:
            started_ns = pop(request)
            records.append(
                pack(
                    epoch_ns + started_ns,
                    request.offset // SECTOR,
                    now_ns - started_ns,
                    min(request.length // SECTOR, most),
                    request.status,
                    request.op,
                )
            )
        self._recorder.add(b"".join(records))  # type: ignore[union-attr]  # wired only if there is one
        self.complete(batch)

    def _now_ns(self) -> int:
        return int(self.env.now() * 1e9)

    def _wall_ns(self) -> int:
        return self._epoch_ns + self._now_ns()

    def control(self, verb: str, arguments: Sequence[str]) -> bytes:
        """Execute a verb of the manual, and return the reply. Raises: DriverError."""
        verbs = {
            "start": self._start, "stop": self._stop, "clear": self._clear, "status": self._status,
            "peek": self._peek, "get": self._get,
        }  # fmt: skip
        if verb not in verbs:
            raise _refusal(f"does not know the verb {verb!r}; it knows {', '.join(sorted(verbs))}", errno.EOPNOTSUPP)
        most = 1 if verb in ("peek", "get") else 0
        if len(arguments) > most:
            raise _refusal(f"{verb} takes {'at most one argument' if most else 'no argument'}, not {len(arguments)}")
        return verbs[verb](*map(_number, arguments)).encode()

    def _start(self) -> str:
        if not self._is_tracking:
            self._set_tracking(True)
            self._clear()
        return self._status()

    def _stop(self) -> str:
        self._set_tracking(False)
        return self._status()

    def _clear(self) -> str:
        self._dirty.clear()
        if self._is_tracking:
            for each in self._in_flight():
                self._dirty.mark(*each)
        return self._status()

    def _set_tracking(self, value: bool) -> None:  # noqa: FBT001 - a setter
        self._is_tracking = self._dirty.is_tracking = value
        self.env.report("tracking", "on" if value else "off")

    def _status(self) -> str:
        dirty = self._dirty
        facts = {
            "tracking": "on" if self._is_tracking else "off",
            "granularity": dirty.granularity,
            "size": dirty.size,
            "dirty_at_most": dirty.dirty_at_most(),
            "unacknowledged_ranges": dirty.unacknowledged,
        }
        if self._recorder is not None:
            facts |= {"recorded": self._recorder.recorded, "lost": self._recorder.lost}
            if self._recorder.problem:
                facts["problem"] = self._recorder.problem
        return "".join(f"{key} {value}\n" for key, value in facts.items())

    def _peek(self, sector: int = 0) -> str:
        ranges, after = self._dirty.peek(sector * SECTOR)
        return _page(ranges, "end" if after >= self._dirty.size else f"more {after // SECTOR}")

    def _get(self, acknowledged: int | None = None) -> str:
        try:
            ranges, page = self._dirty.take(acknowledged, self._in_flight())
        except StalePageError as error:
            raise _refusal(f"{error}: another program is reading, too; begin again with get", errno.ESTALE) from None
        return _page(ranges, f"more {page}" if ranges else "end")

    def close(self) -> None:
        """Write the remaining records, and release the map."""
        if self._recorder is not None:
            self._recorder.close()
        self._dirty.release()


def _page(ranges: list[Range], last_line: str) -> str:
    return "".join(starmap(_line, ranges)) + last_line + "\n"


def _line(offset: int, length: int) -> str:
    return f"{offset // SECTOR} {length // SECTOR}\n"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 15:  # enough for any sector and any page
        raise _refusal(f"{text!r} is not a number from the last line of a page")
    return int(text)


def _refusal(problem: str, code: int = errno.EINVAL) -> DriverError:
    return DriverError(problem, layer="log", errno=code)
