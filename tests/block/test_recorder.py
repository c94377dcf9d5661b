"""The writer of record files: its buffer and files are bounded, and no error of the file reaches the guest."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.helpers_block import StepEnv
from xenbackend.block import record
from xenbackend.block.record import SIZE, Entry, Lost, Session
from xenbackend.block.recorder import BUFFER_LIMIT, IDLE_S, MIN_LIMIT, WRITE_AT, Recorder
from xenbackend.block.request import Op
from xenbackend.errors import DriverError

SESSION = Session(1 << 30, 1_700_000_000_000_000_000, 512, 1)
BATCH = 32  # records, as from a ring


class StuckEnv(StepEnv):
    """An `Env` whose threads never run."""

    def run_in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        """Never run it."""


class LateEnv(StepEnv):
    """An `Env` whose threads run when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Callable[[], None]] = []

    def run_in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        """Keep it until the test runs it."""
        self.jobs += [function, then]


def new_recorder(env: StepEnv, path: Path, limit: int = 64 << 20) -> Recorder:
    """Return a recorder whose clock stands still."""
    return Recorder(env, str(path), limit, record.pack_session(SESSION), lambda: SESSION.began_ns)


def packed(first: int, count: int) -> bytes:
    """Return `count` records of reads of one sector each, from sector `first` on."""
    entries = (Entry(SESSION.began_ns, sector * 512, 512, 1, 0, Op.READ) for sector in range(first, first + count))
    return b"".join(map(record.pack_request, entries))


def fill(recorder: Recorder, count: int) -> None:
    """Add records of sectors 0 to `count`, in batches."""
    for first in range(0, count, BATCH):
        recorder.add(packed(first, min(BATCH, count - first)))


def records(path: Path) -> list[Session | Entry | Lost]:
    """Return what a file holds."""
    with path.open("rb") as stream:
        return list(record.read(stream))


def sectors(*paths: Path) -> list[int]:
    """Return the sector of each request in files."""
    return [each.offset // 512 for path in paths for each in records(path) if isinstance(each, Entry)]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes past `size` bytes of any file fail with EFBIG."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_record_is_written_after_a_second(tmp_path: Path) -> None:
    """A record waits in the buffer until the timer at most, and the timer is set only once."""
    env, path = StepEnv(), tmp_path / "rec"
    recorder = new_recorder(env, path)
    recorder.add(packed(0, 1))
    recorder.add(packed(1, 1))

    assert (0, [IDLE_S]) == (path.stat().st_size, [delay for delay, _ in env.timers])
    env.ring()
    assert [0, 1] == sectors(path)
    recorder.close()


def test_full_buffer_is_written_at_once(tmp_path: Path) -> None:
    """As soon as WRITE_AT bytes are in the buffer, they are written to the file, without a timer."""
    recorder = new_recorder(StepEnv(), tmp_path / "rec")
    fill(recorder, WRITE_AT // SIZE)

    assert WRITE_AT // SIZE == len(sectors(tmp_path / "rec"))
    recorder.close()


def test_timer_after_close_does_nothing(tmp_path: Path) -> None:
    """A timer that goes off after the file was closed does nothing."""
    env, path = StepEnv(), tmp_path / "rec"
    recorder = new_recorder(env, path)
    recorder.add(packed(0, 1))
    recorder.close()
    env.ring()

    assert [0] == sectors(path)


def test_close_overtakes_a_thread_that_has_not_begun(tmp_path: Path) -> None:
    """`close` writes what a thread was asked to write, once and in order, and the thread then finds nothing to do."""
    env, path = LateEnv(), tmp_path / "rec"
    recorder = new_recorder(env, path)
    fill(recorder, WRITE_AT // SIZE + 40)
    recorder.close()
    for job in env.jobs:
        job()

    assert list(range(WRITE_AT // SIZE + 40)) == sectors(path)


def test_session_without_requests_leaves_no_trace(tmp_path: Path) -> None:
    """A chain that is opened only to be looked at adds nothing to the file."""
    new_recorder(StepEnv(), tmp_path / "rec").close()

    assert b"" == (tmp_path / "rec").read_bytes()


def test_next_worker_goes_on_after_a_torn_record(tmp_path: Path) -> None:
    """The next worker overwrites a record that a death cut short, and begins its own records with a session record."""
    path = tmp_path / "rec"
    for sector in (0, 1):
        recorder = new_recorder(StepEnv(), path)
        recorder.add(packed(sector, 1))
        recorder.close()
        with path.open("ab") as file:
            file.write(b"torn")

    assert [Session, Entry, Session, Entry] == [type(each) for each in records(path)]


@pytest.mark.slow
def test_file_begins_anew_at_its_limit(tmp_path: Path) -> None:
    """Two files together take at most twice the limit, and hold the latest records without a gap."""
    path, older = tmp_path / "rec", tmp_path / "rec.1"
    recorder = new_recorder(StepEnv(), path, MIN_LIMIT)
    count = 3 * MIN_LIMIT // SIZE // 2 + 100
    fill(recorder, count)
    recorder.close()

    assert list(range(count)) == sectors(older, path)
    assert path.stat().st_size <= MIN_LIMIT
    assert MIN_LIMIT // 2 <= older.stat().st_size <= MIN_LIMIT


@pytest.mark.slow
def test_file_begins_anew_without_its_older_half_when_that_finds_no_place(tmp_path: Path) -> None:
    """If the older half cannot be kept, it is given up once and for all; it is not copied in vain with every write."""
    path = tmp_path / "rec"
    recorder = new_recorder(StepEnv(), path, MIN_LIMIT)
    fill(recorder, MIN_LIMIT // SIZE - BATCH)
    with file_size_limit(MIN_LIMIT // 2):
        fill(recorder, 4096)
    recorder.close()

    assert b"" == (tmp_path / "rec.1").read_bytes()
    assert 0 == recorder.lost
    assert path.stat().st_size < MIN_LIMIT // 2
    assert "File too large" == recorder.problem


@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_that_was_truncated_has_no_hole(tmp_path: Path, size: int) -> None:
    """If another program truncates the file, such as logrotate, new records follow what is left, as a new session."""
    path = tmp_path / "rec"
    env = StepEnv()
    recorder = new_recorder(env, path)
    recorder.add(packed(0, 100))
    env.ring()
    os.truncate(path, size)
    recorder.add(packed(100, 1))
    recorder.close()

    assert [*range(size // SIZE - bool(size)), 100] == sectors(path)
    assert [Session, Entry] == [type(each) for each in records(path)[-2:]]


def test_what_the_file_does_not_take_is_counted_and_told(tmp_path: Path) -> None:
    """A failed write leaves no partial record. The loss is counted, and recorded as soon as the file can be written."""
    path = tmp_path / "rec"
    recorder = new_recorder(StepEnv(), path)
    with file_size_limit(WRITE_AT + 4096):
        fill(recorder, 2 * WRITE_AT // SIZE)
    lost = (recorder.recorded, recorder.lost, recorder.problem)
    recorder.add(packed(7, 1))
    recorder.close()

    assert (WRITE_AT // SIZE, WRITE_AT // SIZE, "File too large") == lost
    assert [Lost(SESSION.began_ns, WRITE_AT // SIZE)] == [each for each in records(path) if isinstance(each, Lost)]
    assert [*range(WRITE_AT // SIZE), 7] == sectors(path)


def test_slow_file_bounds_the_buffer(tmp_path: Path) -> None:
    """If the thread does not return, the buffer stays bounded, and `close` writes what it holds."""
    path = tmp_path / "rec"
    recorder = new_recorder(StuckEnv(), path)
    kept = (WRITE_AT + BUFFER_LIMIT) // SIZE
    fill(recorder, kept + 10 * BATCH)
    recorder.close()

    assert 10 * BATCH == recorder.lost
    assert list(range(kept)) == sectors(path)
    assert [10 * BATCH] == [each.records for each in records(path) if isinstance(each, Lost)]


def test_other_file_is_not_touched(tmp_path: Path) -> None:
    """A path that holds another kind of file is refused and left unchanged."""
    path = tmp_path / "passwd"
    path.write_bytes(b"root:x:0:0\n")
    with pytest.raises(DriverError, match="holds 11 B of something other than records"):
        new_recorder(StepEnv(), path)

    assert b"root:x:0:0\n" == path.read_bytes()


def test_special_files_are_refused(tmp_path: Path) -> None:
    """A FIFO, a link or a directory is refused as a record file. No FIFO is waited for, and no link followed."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("target")
    for name in ("fifo", "link", ""):
        with pytest.raises(DriverError, match="is not a regular file"):
            new_recorder(StepEnv(), tmp_path / name)

    assert not (tmp_path / "target").exists()


def test_refused_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """A recorder that cannot be opened closes the descriptors that it has opened."""
    (tmp_path / "rec.1").mkdir()
    before = len(open_descriptors())
    with pytest.raises(DriverError, match=r"rec\.1 is not a regular file"):
        new_recorder(StepEnv(), tmp_path / "rec")

    assert before == len(open_descriptors())
