"""`log:` in a chain on real files: exact ranges, no lost write, a record that never harms the guest."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import SIZE, Bottom, Machine, StepEnv, discard, flush, image, read, write
from tests.memories import Memories
from xenbackend.block import record
from xenbackend.block.chain import Chain
from xenbackend.block.dirty import CHUNK_BITS, DirtyMap, memory_size
from xenbackend.block.driver import Driver, Geometry
from xenbackend.block.drivers.log import _PASSED, Log
from xenbackend.block.record import Entry, Lost, Session
from xenbackend.block.request import Op, Request
from xenbackend.errors import ChainError, DriverError
from xenbackend.protocol import codec, messages
from xenbackend.protocol.codes import Code
from xenbackend.worker.env import EnvFactory

CHUNK = CHUNK_BITS * 512  # bytes of disk
TAKEN_OVER = "another program is reading, too; begin again with get"


class Instant(Driver):
    """A source that does nothing and completes requests at once."""

    def __init__(self) -> None:
        super().__init__(None)

    def submit(self, batch: list[Request]) -> None:
        """Give the batch back."""
        for request in batch:
            request.status = 0
        self.complete(batch)


def lone_log(env: StepEnv, below: Driver, size: int = SIZE, **options: object) -> Log:
    """Return an open `log:` above `below`, connected as in a chain. Its completions are discarded."""
    log = Log(Log.Options(**options))
    log.next, log.below = below, Geometry(size=size, can_discard=True)
    log.env = env
    log.open(env)
    log.complete = list.clear
    below.complete = log.on_complete or log.complete
    return log


def page(log: Log | Chain, verb: str, *arguments: str) -> tuple[list[tuple[int, int]], str]:
    """Return the ranges, in sectors, and the last line of a reply."""
    reply = log.control("log", verb, arguments) if isinstance(log, Chain) else log.control(verb, arguments)
    *lines, last = reply.decode().splitlines()
    return [(int(first), int(count)) for first, count in map(str.split, lines)], last


def status(log: Log) -> dict[str, str]:
    """Return the facts of the verb `status`."""
    return dict(line.split(" ", 1) for line in log.control("status", []).decode().splitlines())


def records(path: Path) -> list[Session | Entry | Lost]:
    """Return what a record file holds."""
    with path.open("rb") as stream:
        return list(record.read(stream))


def requests_in(path: Path) -> list[tuple[Op, int, int, int]]:
    """Return operation, offset, length and status of each request in a record file."""
    return [(each.op, each.offset, each.length, each.status) for each in records(path) if isinstance(each, Entry)]


@pytest.mark.parametrize("seed", range(4))
def test_shows_exactly_the_written_ranges(machine: Machine, tmp_path: Path, seed: int) -> None:
    """`peek` and `get` report every sector that was written or discarded, and no other."""
    random = Random(seed)
    chain = machine.open(f"log:|aio:{image(tmp_path / 'img')}")
    written: set[int] = set()
    for _ in range(20):
        batch = []
        for _ in range(random.randrange(1, 33)):
            first, count = random.randrange(SIZE // 512 - 20), random.randrange(1, 20)
            make = random.choice((read, discard, lambda at, length: write(at, b"x" * length)))
            batch.append(make(first * 512, count * 512))
            if batch[-1].op != Op.READ:
                written.update(range(first, first + count))
        machine.do(chain, *batch, flush())

    for verb in ("peek", "get"):
        ranges, _ = page(chain, verb)

        assert sorted(written) == [sector for first, count in ranges for sector in range(first, first + count)]
    chain.close()


def test_range_is_dirty_before_the_layer_below_has_it() -> None:
    """A range is marked before its write goes down, so it is found even if the worker dies before that comes back."""
    seen = []

    class Looking(Instant):
        def submit(self, batch: list[Request]) -> None:
            seen.append(page(log, "peek")[0])
            super().submit(batch)

    log = lone_log(StepEnv(), Looking())
    log.submit([write(4096, b"x" * 4096)])

    assert [[(8, 8)]] == seen


def test_failed_write_stays_dirty(machine: Machine) -> None:
    """A write that failed may have changed the medium, so its range is dirty."""
    chain = machine.open("log:|fault:op=write|ram:1M")

    assert [errno.EIO] == machine.do(chain, write(0, b"x" * 512))
    assert [(0, 1)] == page(chain, "peek")[0]
    chain.close()


def test_without_file_completions_pass_by(machine: Machine, tmp_path: Path) -> None:
    """Completions pass through the layer only if there is a record file. Otherwise they go to the one above at once."""
    with_file = machine.open(f"log:{tmp_path / 'rec'}|ram:1M")
    without = machine.open("log:|ram:1M")

    assert without.layers[0].driver.on_complete is None
    assert with_file.layers[0].driver.on_complete is not None
    with_file.close()
    without.close()


def test_start_stop_clear() -> None:
    """`stop` keeps the map, `start` empties it unless tracking was on, and `clear` empties it."""
    log = lone_log(StepEnv(), Instant(), track=False)
    shown = []
    for verb in ("", "start", "start", "stop", "start", "clear"):
        if verb:
            log.control(verb, [])
        shown.append(page(log, "peek")[0])
        log.submit([write(len(shown) * 4096, b"x" * 512)])

    assert [[], [], [(16, 1)], [(16, 1), (24, 1)], [], []] == shown
    assert [(48, 1)] == page(log, "peek")[0]


def test_status_names_what_an_operator_asks_for() -> None:
    """`status` says whether writes are tracked, how large the map's pieces are, and at least as much as is dirty."""
    log = lone_log(StepEnv(), Instant(), size=4 * CHUNK, granularity=512)
    log.submit([write(CHUNK, b"x" * 512)])

    assert {
        "tracking": "on",
        "granularity": "512",
        "size": str(4 * CHUNK),
        "dirty_at_most": str(CHUNK),
        "unacknowledged_ranges": "0",
    } == status(log)


def test_a_disk_of_pebibytes_takes_no_more_memory_than_others() -> None:
    """The map never asks for more than 257 MiB, whatever size an image claims. `status` has the size of its pieces."""
    env = StepEnv()
    log = lone_log(env, Instant(), size=1 << 51, granularity=512)
    log.submit([write(1 << 50, b"x" * 512)])

    assert [True] == [len(memory) <= 257 << 20 for memory in env.memories.values()]
    assert ("1048576", [(1 << 41, 2048)]) == (status(log)["granularity"], page(log, "peek")[0])


def test_a_map_with_smaller_pieces_is_begun_anew() -> None:
    """After an upgrade from a version with a larger map for a large disk, everything is dirty: no write is lost."""
    size = 2 << 40
    env = StepEnv(resumes=True)
    former = DirtyMap(env.memory("dirty", memory_size(size, 512)), size, 512, is_tracking=True)
    former.mark(0, 512)
    log = lone_log(env, Instant(), size=size, granularity=512)

    assert ("1024", str(size)) == (status(log)["granularity"], status(log)["dirty_at_most"])


def test_get_forgets_a_page_only_when_the_next_is_asked_for() -> None:
    """A page is forgotten only when the next is asked for. If its reader dies, the next sweep has it, too."""
    log = lone_log(StepEnv(), Instant())
    log.submit([write(0, b"x" * 512)])

    first, more = page(log, "get")
    log.submit([write(4096, b"x" * 512)])

    assert ([(0, 1)], [(0, 1), (8, 1)]) == (first, page(log, "peek")[0])
    ranges, more = page(log, "get")
    assert [(0, 1), (8, 1)] == ranges
    assert ([], "end") == page(log, "get", more.split()[1])
    assert ([], "end") == page(log, "peek")


def test_what_is_in_flight_at_a_get_is_dirty_for_the_next_sweep() -> None:
    """A write that lands after its range was handed out and acknowledged is in the next sweep, and in no later one."""
    below = Bottom()
    log = lone_log(StepEnv(), below)
    log.submit([write(512, b"x" * 512), read(8192, 512), flush(), discard(4096, 512)])

    for is_back, expected in ((False, [(1, 1), (8, 1)]), (True, [(1, 1), (8, 1)]), (True, [])):
        if is_back:
            for request in below.batches[0]:
                request.status = 0
        ranges, last = page(log, "get")
        assert expected == ranges
        if ranges:
            assert ([], "end") == page(log, "get", last.split()[1])


@pytest.mark.parametrize("verb", ["start", "clear"])
def test_an_empty_map_begins_with_what_is_in_flight(verb: str) -> None:
    """A write or discard in flight at a `start` or `clear` may land after a copy was made, so its range is dirty."""
    below = Bottom()
    log = lone_log(StepEnv(), below, track=verb == "clear")
    back, pending = write(0, b"x" * 512), write(4096, b"x" * 512)
    log.submit([back, pending, read(8192, 512), flush()])
    back.status = 0
    log.control(verb, [])

    assert [(8, 1)] == page(log, "peek")[0]


def test_a_map_that_does_not_track_gets_no_ranges_from_in_flight_requests() -> None:
    """After `stop`, a write in flight is marked again if `get` hands out its range, and not otherwise."""
    log = lone_log(StepEnv(), Bottom())
    log.submit([write(0, b"x" * 512)])
    log.control("stop", [])
    log.submit([write(4096, b"x" * 512)])

    for _ in range(2):
        assert [(0, 1)] == page(log, "get")[0]
    log.control("clear", [])
    assert ([], "end") == page(log, "get")


def test_requests_that_came_back_are_not_remembered_for_ever() -> None:
    """However many requests a layer above makes, the memory for those in flight is bounded and loses none of them."""
    log = lone_log(StepEnv(), Instant(), size=1 << 30)
    instant, log.next = log.next, Bottom()
    log.submit([write(0, b"x" * 512)])
    log.next = instant
    for _ in range(2 * _PASSED // 32 + 1):
        log.submit([write(4096, b"x" * 512) for _ in range(32)])

    assert len(log._passed) <= _PASSED
    log.control("clear", [])
    assert [(0, 1)] == page(log, "peek")[0]


def test_replies_fit_into_a_message() -> None:
    """The largest reply fits into one datagram: every other sector dirty, and the others handed out meanwhile."""
    log = lone_log(StepEnv(), Instant(), size=2 * CHUNK)
    for start in (0, 512):
        for offset in range(start, 2 * CHUNK, 1024):
            log._dirty.mark(offset, 512)
        if start == 0:
            handed = log.control("get", [])
    peeked = log.control("peek", [])

    for data in (handed, peeked):
        reply = messages.Reply(1, Code.OK, data=data.decode("latin-1"))
        assert len(codec.encode(reply)) < messages.MAX_MESSAGE // 2


def test_pages_of_peek_cover_the_disk() -> None:
    """The last line of a page has the argument for the next page, until the end of the disk."""
    log = lone_log(StepEnv(), Instant(), size=4 * CHUNK)
    for offset in range(0, 4 * CHUNK, 1024):
        log._dirty.mark(offset, 512)
    found, (keyword, *position) = [], ["more", "0"]
    while keyword == "more":
        ranges, last = page(log, "peek", *position)
        keyword, *position = last.split()
        found += ranges

    assert [(sector, 1) for sector in range(0, 4 * CHUNK // 512, 2)] == found


@pytest.mark.parametrize(
    ("verb", "arguments", "sentence"),
    [
        ("fly", [], "log: does not know the verb 'fly'; it knows clear, get, peek, start, status, stop"),
        ("get", ["x"], "log: 'x' is not a number from the last line of a page"),
        ("peek", ["-1"], "log: '-1' is not a number from the last line of a page"),
        ("peek", ["9" * 16], f"log: '{'9' * 16}' is not a number from the last line of a page"),
        ("get", ["1", "2"], "log: get takes at most one argument, not 2"),
        ("clear", ["1"], "log: clear takes no argument, not 1"),
        ("get", ["77"], f"log: page 77 is not the last one that was handed out: {TAKEN_OVER}"),
    ],
)
def test_refusals(verb: str, arguments: list[str], sentence: str) -> None:
    """An order that cannot be carried out is refused with a message and changes nothing."""
    log = lone_log(StepEnv(), Instant())
    with pytest.raises(DriverError) as refused:
        log.control(verb, arguments)

    assert sentence == str(refused.value)


def test_peek_past_the_end_is_the_end() -> None:
    """A position beyond the end of the disk, such as that of another disk's reader, finds nothing."""
    log = lone_log(StepEnv(), Instant())
    log.submit([write(0, b"x" * 512)])

    assert ([], "end") == page(log, "peek", "9" * 15)


@pytest.mark.parametrize(("option", "value"), [("granularity", "1000"), ("granularity", "256"), ("limit", "1K")])
def test_impossible_options(machine: Machine, option: str, value: str) -> None:
    """A granularity that is not a power of two, or a limit below the buffer's size, is refused before opening."""
    with pytest.raises(ChainError, match=option):
        machine.open(f"log:,{option}={value}|ram:1M")


def test_successor_goes_on_where_the_dead_worker_was(machine: Machine) -> None:
    """A successor has the map and the tracking state of the dead worker, whatever the option `track` says."""
    memories = Memories()
    machine.make_env = EnvFactory(machine.reactor, machine.files, make=memories.make)
    dead = machine.open("log:,track=on|ram:1M")
    machine.do(dead, write(512, b"x" * 1024))
    dead.control("log", "stop", [])
    machine.make_env = EnvFactory(machine.reactor, machine.files, memories.kept)
    successor = machine.open("log:,track=on|ram:1M")

    assert [(1, 2)] == page(successor, "peek")[0]
    assert b"tracking off\n" in successor.control("log", "status", [])
    dead.close()
    successor.close()


def test_record_holds_every_request(machine: Machine, tmp_path: Path) -> None:
    """The file records operation, range and status of each request, and only its owner can read it."""
    path = tmp_path / "rec"
    chain = machine.open(f"log:{path}|aio:{image(tmp_path / 'img')}")
    machine.do(chain, write(512, b"x" * 1024), read(0, 512))
    machine.do(chain, discard(4096, 8192), flush())
    chain.close()

    assert isinstance(records(path)[0], Session)
    assert {
        (Op.WRITE, 512, 1024, 0),
        (Op.READ, 0, 512, 0),
        (Op.DISCARD, 4096, 8192, 0),
        (Op.FLUSH, 0, 0, 0),
    } == set(requests_in(path))
    assert 0o600 == path.stat().st_mode & 0o777


class Failing(Bottom):
    """A source that completes requests with EIO when the test says so."""

    def fail(self) -> None:
        """Fail all requests that are held."""
        for batch in self.batches:
            for request in batch:
                request.status = errno.EIO
            self.complete(batch)


class ClockEnv(StepEnv):
    """An `Env` with a clock that the test sets."""

    time_s = 100.0

    def now(self) -> float:
        """Return what the test set."""
        return self.time_s


def test_record_tells_errors_and_latency(tmp_path: Path) -> None:
    """A record has the status that the guest got and the time from submission to completion."""
    env, below, path = ClockEnv(), Failing(), tmp_path / "rec"
    log = lone_log(env, below, record=str(path))
    log.submit([read(0, 512)])
    env.time_s += 0.25
    below.fail()
    log.close()
    session, entry = records(path)

    assert isinstance(session, Session)
    assert isinstance(entry, Entry)
    assert (errno.EIO, 250_000_000, session.began_ns) == (entry.status, entry.latency_ns, entry.time_ns)


def fill(log: Log, count: int) -> None:
    """Read `count` sectors, numbered from 0, in batches of a ring's size."""
    for first in range(0, count, 32):
        log.submit([read((first + place) * 512, 512) for place in range(min(32, count - first))])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes past `size` bytes of any file fail with EFBIG."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_fault_of_the_file_never_reaches_the_guest(tmp_path: Path) -> None:
    """If the file cannot be written, records are counted as lost and reported later. Requests are not affected."""
    env, path = StepEnv(), tmp_path / "rec"
    log = lone_log(env, Instant(), size=1 << 30, record=str(path))
    done: list[Request] = []
    log.complete = done.extend
    with file_size_limit(70_000):
        fill(log, 4096)
    facts = status(log)
    log.submit([read(0, 512)])
    log.close()

    assert (4097, {0}) == (len(done), {request.status for request in done})
    assert ("2048", "2048", "File too large") == (facts["recorded"], facts["lost"], facts["problem"])
    assert [Lost] == [type(each) for each in records(path)[-1:]]
    assert 2048 == sum(each.records for each in records(path) if isinstance(each, Lost))
    assert 2049 == len(requests_in(path))
