"""Files that remember every write, and disks on them that are killed at each of them.

`RecordedFile` is a `File` in memory: requests wait until `step` does some of them, in any order. `log` records what it
did, so that `state` gives the file as it was after any number of changes, with the next write torn. `Session` drives a
disk with requests in flight that do not overlap, and says what the disk may hold when it is killed at any moment.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.helpers_block import StepEnv, content, flush, read, write
from xenbackend.block.chain import Chain, open_chain, parse_chain
from xenbackend.block.driver import Complete, Found
from xenbackend.block.places import Places
from xenbackend.block.request import Op, Request
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.opening import Facts

SECTOR = 512


@dataclass(frozen=True)
class Change:
    """One change of a file: bytes at a place, a new length (with bytes at its end), or a flush."""

    kind: str  # "write", "grow" or "flush"
    place: int = 0
    data: bytes = b""


@dataclass
class RecordedFile:
    """See the head of this file. `fails` gives a request its errno, or 0."""

    bytes: bytearray
    chance: Random = field(default_factory=lambda: Random(0))
    is_device: bool = False
    read_only: bool = False
    log: list[Change] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    fails: Callable[[Request], int] = lambda request: 0
    complete: Complete = lambda batch: None
    sector_size: int = 512
    physical_sector_size: int = 512
    can_discard: bool = False
    discard_granularity: int = 0
    mode: str = "recorded"

    @property
    def size(self) -> int:
        """See `File`."""
        return len(self.bytes)

    def submit(self, batch: list[Request]) -> None:
        """Take requests; `step` does them."""
        self.waiting += batch

    def step(self) -> bool:
        """Do some of the requests that wait; False if none does."""
        if not self.waiting:
            return False
        self.chance.shuffle(self.waiting)
        count = self.chance.randint(1, min(3, len(self.waiting)))
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        for request in batch:
            request.status = self.fails(request) or self._do(request)
        self.complete(batch)
        return True

    def _do(self, request: Request, by: int = 0) -> int:
        start, end = request.offset + by, request.offset + by + request.length
        if request.op == Op.READ:
            found = self.read_at(start, request.length).ljust(request.length, b"\0")
            for view in request.iov:
                view[:], found = found[: len(view)], found[len(view) :]
        elif request.op == Op.FLUSH:
            self.sync()
        elif self.read_only or end > self.size or (request.op == Op.DISCARD and not self.can_discard):
            return errno.EINVAL
        else:
            self.write_at(start, content(request) if request.op == Op.WRITE else bytes(request.length))
        return 0

    def read_mapped(
        self, batch: list[Request], places: Places
    ) -> tuple[list[Request], list[tuple[Request, int]], list[Request]]:
        """See `HostFile`: some of these reads are done at once, some are late."""
        done, late, rest = list[Request](), list[tuple[Request, int]](), list[Request]()
        for request in batch:
            place = places.find(request.offset, request.length)
            if place < 0 or request.op != Op.READ:
                rest.append(request)
            elif self.fails(request) or self.chance.random() < 0.5:
                late.append((request, place))
            else:
                request.status = self._do(request, place - request.offset)
                done.append(request)
        return done, late, rest

    def do_moved(self, batch: list[Request], by: int) -> tuple[list[Request], list[Request]]:
        """See `HostFile`: some of these are done at once, some are late."""
        done, late = list[Request](), list[Request]()
        for request in batch:
            is_late = self.fails(request) or self.chance.random() < 0.5 or request.op > Op.WRITE
            if is_late or request.offset + by + request.length > self.size or self._do(request, by):
                late.append(request)
            else:
                request.status = 0
                done.append(request)
        return done, late

    def read_at(self, offset: int, length: int) -> bytes:
        """See `File`."""
        return bytes(self.bytes[offset : offset + length])

    def write_at(self, offset: int, data: bytes) -> None:
        """See `File`."""
        assert offset + len(data) <= self.size
        self.bytes[offset : offset + len(data)] = data
        self.log.append(Change("write", offset, bytes(data)))

    def sync(self) -> None:
        """See `File`."""
        self.log.append(Change("flush"))

    @property
    def allocated(self) -> int:
        """See `File`."""
        return 0 if self.is_device else self.size

    def next_data(self, offset: int) -> tuple[int, int]:
        """See `File`: it has no holes."""
        return offset, self.size

    def grow(self, size: int, tail: bytes = b"") -> None:
        """See `File`."""
        if size <= self.size:
            return
        if self.is_device:
            raise OSError(errno.ENOSPC, "a block device cannot grow")
        _grow(self.bytes, size, tail)
        self.log.append(Change("grow", size, tail))

    def close(self) -> None:
        """See `File`."""


def _grow(file: bytearray, size: int, tail: bytes) -> None:
    file.extend(bytes(max(0, size - len(file))))
    file[size - len(tail) : size] = tail


def state(start: bytes, log: list[Change], count: int, torn: int = 0) -> bytearray:
    """Return a file after the first `count` changes, and `torn` bytes of the next one."""
    file = bytearray(start)
    for change in log[:count]:
        _apply(file, change, len(change.data))
    if torn and count < len(log) and log[count].kind == "write":
        _apply(file, log[count], torn)
    return file


def tears(log: list[Change]) -> Iterator[tuple[int, int]]:
    """Yield every place where a writer may be killed: changes done, and bytes of the next one in steps of 512."""
    for count in range(len(log) + 1):
        yield count, 0
        if count < len(log) and log[count].kind == "write":
            length = len(log[count].data)
            yield from ((count, torn) for torn in {SECTOR, length // 2 // SECTOR * SECTOR, length - SECTOR} - {0})


def after_power_loss(start: bytes, log: list[Change], chance: Random) -> tuple[bytearray, int]:
    """Return a file as a power loss may leave it, with any part of the changes since the last flush, and that flush."""
    return lost_power(start, log, chance.randint(0, len(log)), chance)


def lost_power(start: bytes, log: list[Change], count: int, chance: Random) -> tuple[bytearray, int]:
    """Return the same for a power loss after `count` changes."""
    flushed = max((place for place in range(count) if log[place].kind == "flush"), default=0)
    file = state(start, log, flushed)
    for change in log[flushed:count]:
        if chance.random() < 0.5:
            if change.kind == "write" and change.place + len(change.data) > len(file):
                _grow(file, change.place + len(change.data), b"")
            sectors = len(change.data) // SECTOR
            is_torn = change.kind == "write" and sectors > 1 and chance.random() < 0.3
            _apply(file, change, chance.randrange(sectors) * SECTOR if is_torn else len(change.data))
    return file, flushed


def _apply(file: bytearray, change: Change, length: int) -> None:
    if change.kind == "write":
        file[change.place : change.place + length] = change.data[:length]
    elif change.kind == "grow" and change.place > len(file):
        _grow(file, change.place, change.data)


class RecordedFiles:
    """Files by path."""

    def __init__(self, **files: RecordedFile) -> None:
        self.files: dict[str, RecordedFile] = files

    def open(self, path: str, *, read_only: bool, **_: object) -> RecordedFile:
        """See `Files`."""
        file = self.files[path]
        file.read_only = read_only
        return file

    def find(self, _what: str, image: str, names: Sequence[str], _within: str = "") -> Found:
        """See `Files`: whatever an image names may be had."""
        beside = Path(image).parent
        return next(Found(path, "the test") for name in names if (path := str(beside / name)) in self.files)

    def look(self, path: str) -> Facts:
        """See `Files`: what is at the path, if something is."""
        is_device = path in self.files and self.files[path].is_device
        try:
            return replace(LocalOpener().look(path), is_device=is_device)
        except FileNotFoundError:
            if path not in self.files:
                raise
            return Facts(path, is_device=is_device, size=0, mtime_ns=0, discard_granularity=0, real=path)

    def resolve(self, path: str) -> str:
        """See `Files`."""
        return LocalOpener().resolve(path)

    def open_record(self, path: str) -> int:
        """See `Files`."""
        return LocalOpener().open_record(path)


@dataclass
class Written:
    """A write of the guest, and when it was sent and answered, counted in changes of the file."""

    offset: int
    data: bytes
    sent: int
    answered: int = -1  # not yet
    status: int = 0


class Disk:
    """An open chain on recorded files whose requests wait for `run`."""

    def __init__(self, text: str, files: RecordedFiles, *, read_only: bool = False, is_draft: bool = False) -> None:
        self.files = files
        self._is_draft = is_draft
        self.chance = Random(0)
        self.calls: list[Callable[[], None]] = []
        self.chain: Chain = open_chain(parse_chain(text), self._env, read_only=read_only, checked=True)
        self.back: list[Request] = []
        self.chain.complete = self.back.extend

    def _env(self, layer: str, /, *, read_only: bool, shareable: bool) -> StepEnv:
        env = StepEnv(read_only=read_only, shareable=shareable, is_draft=self._is_draft, files=self.files)
        env.run_in_thread = self._in_thread
        env.wait_for = self._wait_for
        return env

    def _wait_for(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            assert self.step(), "nothing will ever happen"

    def _in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        def call() -> None:
            function()
            then()

        self.calls.append(call)

    def step(self) -> bool:
        """Let something happen; False if nothing is left to do."""
        happened = False
        if self.calls and self.chance.random() < 0.5:
            self.calls.pop(0)()
            return True
        for file in self.files.files.values():
            happened = file.step() or happened
        if not happened and self.calls:
            self.calls.pop(0)()
            return True
        return happened

    def do(self, *batch: Request) -> list[int]:
        """Submit a batch, let everything happen, and return the status of each."""
        self.chain.submit(list(batch))
        while self.step():
            pass
        assert set(batch) <= set(self.back), "some were never given back"
        self.back.clear()
        return [request.status for request in batch]

    def everything(self) -> bytes:
        """Return what the disk holds."""
        request = read(0, self.chain.geometry.size)
        assert [0] == self.do(request)
        return content(request)


@dataclass
class Session:
    """A guest's requests to a disk, and what the disk may hold after any of the file's changes."""

    disk: Disk
    file: RecordedFile
    first: bytes  # what the disk held before
    chance: Random
    writes: list[Written] = field(default_factory=list)
    flushes: list[Written] = field(default_factory=list)

    def run(self, count: int, longest: int, *, in_flight: int = 6) -> None:
        """Send so many requests, a few at a time, and let all of them end."""
        out: dict[Request, Written] = {}
        for _ in range(count):
            batch = self._batch(out, longest, in_flight)
            if batch:
                self.disk.chain.submit(batch)
                self._collect(out)
            while len(out) > self.chance.randint(0, in_flight) and self.disk.step():
                self._collect(out)
        while out:
            assert self.disk.step(), f"never answered: {list(out)}"
            self._collect(out)

    def _batch(self, out: dict[Request, Written], longest: int, in_flight: int) -> list[Request]:
        batch = []
        for _ in range(self.chance.randint(1, 4)):
            length = self.chance.choice([1, 1, 8, self.chance.randint(1, longest)]) * SECTOR
            offset = self.chance.randrange(0, (len(self.first) - length) // SECTOR + 1) * SECTOR
            busy = any(each.offset < offset + length and offset < each.offset + len(each.data) for each in out.values())
            if busy or len(out) >= in_flight:
                continue
            if self.chance.random() < 0.2:
                request, written = flush(), Written(0, b"", len(self.file.log))
                self.flushes.append(written)
            else:
                data = self.chance.randbytes(length)
                request, written = write(offset, data), Written(offset, data, len(self.file.log))
                self.writes.append(written)
            out[request] = written
            batch.append(request)
        return batch

    def _collect(self, out: dict[Request, Written]) -> None:
        for request in self.disk.back:
            written = out.pop(request)
            written.answered, written.status = len(self.file.log), request.status
        self.disk.back.clear()

    def faults_of_a_kill(self, found: bytes, count: int) -> list[int]:
        """Return the sectors that a writer killed after `count` changes of the file may not have left so."""
        expected = bytearray(self.first)
        open_now: list[Written] = []
        for each in self.writes:
            if 0 <= each.answered <= count and not each.status:
                expected[each.offset : each.offset + len(each.data)] = each.data
            elif each.sent <= count:
                open_now.append(each)
        return [sector for sector in _differing(found, expected) if not _is_from(found, sector, open_now)]

    def faults_of_power_loss(self, found: bytes, flushed: int) -> list[int]:
        """Return the sectors that were durable by change number `flushed` of the file, and have another content now."""
        expected = bytearray(self.first)
        done = max((each.sent for each in self.flushes if 0 <= each.answered <= flushed + 1), default=-1)
        touched = set()
        for each in self.writes:
            if 0 <= each.answered <= done and not each.status:
                expected[each.offset : each.offset + len(each.data)] = each.data
            else:
                touched.update(range(each.offset // SECTOR, (each.offset + len(each.data)) // SECTOR))
        return [sector for sector in _differing(found, expected) if sector not in touched]


def _differing(one: bytes, other: bytes | bytearray) -> list[int]:
    if one == other:
        return []
    places = range(0, len(other), SECTOR)
    return [place // SECTOR for place in places if one[place : place + SECTOR] != other[place : place + SECTOR]]


def _is_from(found: bytes, sector: int, writes: list[Written]) -> bool:
    place = sector * SECTOR
    return any(
        each.offset <= place < each.offset + len(each.data)
        and found[place : place + SECTOR] == each.data[place - each.offset : place - each.offset + SECTOR]
        for each in writes
    )


def at(path: Path) -> str:
    """Make an empty file at a path, for code that checks whether it exists, and return the path as text."""
    path.touch()
    return str(path)
