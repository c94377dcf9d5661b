"""Tests of `xenbackend.worker.cached`; test_files.py checks contents against a model."""

import errno
import os
from collections.abc import Iterator

import pytest

from tests import places
from xenbackend.block.places import Places
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.cached import _runs
from xenbackend.worker.files import HostFiles
from xenbackend.worker.image import Image

CONTENT = b"".join(bytes([number]) * 4096 for number in range(64))


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture(params=[places.DISK, places.MEMORY])
def image(reactor: Reactor, request: pytest.FixtureRequest) -> Iterator[Image]:
    """Return an image through the page cache, which holds all of it."""
    path = request.param / f"{places.prefix()}{os.getpid()}"
    path.write_bytes(CONTENT)
    files = HostFiles(reactor)
    made = files.open(str(path), read_only=False, direct=False)
    yield made
    path.unlink()
    made.close()
    files.close()


def request_of(op: Op, offset: int, length: int = 4096, pieces: int = 1) -> Request:
    """Return a request whose memory is in `pieces` pieces."""
    request = Request()
    request.op, request.offset, request.length = op, offset, length
    request.iov = [memoryview(bytearray(length // pieces)) for _ in range(pieces)]
    return request


def serve(reactor: Reactor, image: Image, batch: list[Request]) -> list[list[Request]]:
    """Submit a batch, run until all of it is back, and return the batches in which it came back."""
    back: list[list[Request]] = []

    def complete(done: list[Request]) -> None:
        back.append(done)
        if PENDING not in {each.status for each in batch}:
            reactor.call_soon(reactor.stop)

    image.complete = complete
    image.submit(list(batch))
    reactor.run()
    return back


def test_warm_batch_comes_back_at_once(reactor: Reactor, image: Image) -> None:
    """A batch that is in the page cache is completed in one call before `submit` returns."""
    serve(reactor, image, [request_of(Op.READ, 0)])  # a file system may turn out not to know RWF_NOWAIT
    batch = [request_of(op, place * 8192) for place, op in enumerate([Op.READ, Op.WRITE, Op.READ, Op.READ])]
    back: list[list[Request]] = []
    image.complete = back.append
    image.submit(list(batch))

    assert back == [batch]
    assert bytes(batch[2].iov[0]) == CONTENT[16384:20480]


def test_cold_read_does_not_block(reactor: Reactor, image: Image) -> None:
    """A read that is not in the page cache is completed later, with the right data."""
    os.fsync(image.fd)
    os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    batch = [request_of(Op.READ, place * 65536) for place in (3, 1, 2, 0)]
    serve(reactor, image, batch)

    assert [each.status for each in batch] == [0, 0, 0, 0]
    assert [each.iov[0][0] for each in batch] == [48, 16, 32, 0]


def test_what_was_lost_is_not_mapped(reactor: Reactor, image: Image) -> None:
    """F2: once the file of a cache was cut off, a block in it is read as any request of that file, which fails for what
    was lost, even if another program has made the file longer again; nothing is copied from the page cache.
    """
    os.truncate(image.fd, 4096)
    image.extent.look(image.size)
    os.truncate(image.fd, len(CONTENT))
    index = Places(16, 12, 0)
    index.put(5, 3)
    lost = request_of(Op.READ, 5 * 4096)

    assert ([], [(lost, 3 * 4096)], []) == image.read_mapped([lost], index)
    assert ([], [lost]) == image.do_moved([lost], -2 * 4096)
    lost.offset = 3 * 4096
    serve(reactor, image, [lost])
    assert errno.EIO == lost.status


def test_what_memory_has_is_done_further_on(reactor: Reactor, image: Image) -> None:
    """Reads and writes are done at once that many bytes further on, neighbours by one call. What would reach past the
    end, or is neither, is returned as it was, and nothing else is written.
    """
    serve(reactor, image, [request_of(Op.READ, 0)])  # a file system may turn out not to know RWF_NOWAIT
    by, end = 8 * 4096, len(CONTENT) - 8 * 4096
    done = [request_of(Op.READ, place * 4096, pieces=2) for place in (5, 6, 7, 20)]
    done += [request_of(Op.WRITE, place) for place in (4096, 8192, end - 4096)]
    late = [request_of(Op.WRITE, end), request_of(Op.READ, end), request_of(Op.WRITE, end - 512)]
    late += [request_of(Op.FLUSH, 0, 0), request_of(Op.DISCARD, 0, 4096)]
    for each in done + late:
        for view in each.iov if each.op == Op.WRITE else ():
            view[:] = b"w" * len(view)
    image.complete = pytest.fail
    batch = [*done[:3], late[0], *done[3:6], *late[1:], done[6]]
    got_done, got_late = image.do_moved(list(batch), by)

    assert {id(each) for each in done} == {id(each) for each in got_done}
    assert late == got_late
    assert [(0, 0)] * len(done) == [(each.status, each.offset % 4096) for each in done]
    assert [(PENDING, True)] * len(late) == [(each.status, each.offset in (0, end, end - 512)) for each in late]
    assert [13, 14, 15, 28] == [each.iov[1][2047] for each in done[:4]]
    expected = bytearray(CONTENT)
    expected[by + 4096 : by + 12288] = b"w" * 8192
    expected[-4096:] = b"w" * 4096
    assert expected == os.pread(image.fd, len(CONTENT) + 4096, 0)


def test_neighbours_are_joined(reactor: Reactor, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for adjacent places are done in one call, and each gets its own bytes."""
    calls: list[int] = []
    preadv = os.preadv

    def count(fd: int, iov: list[memoryview], offset: int, flags: int = 0) -> int:
        calls.append(offset)
        return preadv(fd, iov, offset, flags)

    image._read_flags = 0  # not every file system knows RWF_NOWAIT
    monkeypatch.setattr(os, "preadv", count)
    batch = [request_of(Op.READ, place * 4096, pieces=2) for place in (5, 6, 7, 20, 21)]
    serve(reactor, image, batch)

    assert calls == [5 * 4096, 20 * 4096]
    assert [(each.status, each.iov[0][0], each.iov[1][2047]) for each in batch] == [
        (0, number, number) for number in (5, 6, 7, 20, 21)
    ]


def test_joined_writes(reactor: Reactor, image: Image) -> None:
    """Joined writes go to the right places; one that would make the file grow fails alone."""
    batch = [request_of(Op.WRITE, len(CONTENT) - 8192 + place * 4096) for place in range(3)]
    for number, each in enumerate(batch):
        each.iov[0][:] = bytes([100 + number]) * 4096
    serve(reactor, image, batch)

    assert [each.status for each in batch] == [0, 0, errno.EINVAL]
    assert os.pread(image.fd, 12288, len(CONTENT) - 8192) == b"d" * 4096 + b"e" * 4096


def test_run_that_is_cut_short(reactor: Reactor, image: Image) -> None:
    """If only the first of joined reads can be done in full, they are repeated one by one, and each gets its own
    status.
    """
    os.ftruncate(image.fd, 4096)
    batch = [request_of(Op.READ, 0), request_of(Op.READ, 4096)]
    serve(reactor, image, batch)

    assert [each.status for each in batch] == [0, errno.EIO]


def test_runs() -> None:
    """A run contains adjacent requests of one operation, and no more pieces than one call takes."""
    batch = [
        request_of(Op.READ, 0), request_of(Op.READ, 4096), request_of(Op.WRITE, 8192), request_of(Op.WRITE, 4096),
        request_of(Op.WRITE, 8192), request_of(Op.FLUSH, 12288, 0), request_of(Op.FLUSH, 12288, 0),
    ]  # fmt: skip
    long = [request_of(Op.READ, place * 512 * 600, 512 * 600, pieces=600) for place in range(3)]

    assert [len(run) for run in _runs(batch)] == [2, 1, 2, 1, 1]
    assert [len(run) for run in _runs(long)] == [1, 1, 1]


@pytest.mark.parametrize("direct", [False, True])
def test_what_memory_has_is_read_through_a_map_of_blocks(reactor: Reactor, *, direct: bool) -> None:
    """A read within a mapped block is done at once, or returned with its mapped place to be done later; other requests
    are left alone.
    """
    path = places.DISK / f"{places.prefix()}{os.getpid()}"
    path.write_bytes(CONTENT)
    files = HostFiles(reactor)
    image = files.open(str(path), read_only=False, direct=direct)
    inside, across = request_of(Op.READ, 3 * 8192 + 4096, pieces=4), request_of(Op.READ, 3 * 8192 + 4096, 8192)
    behind = request_of(Op.READ, 5 * 8192)
    rest = [request_of(Op.WRITE, 3 * 8192), across, request_of(Op.READ, 4 * 8192), request_of(Op.FLUSH, 0, 0)]
    known = Places((len(CONTENT) >> 13) + 1, 13, 0)
    for block, slot in ((3, 5), (5, len(CONTENT) >> 13), (0, 0)):
        known.put(block, slot)
    done, late, left = image.read_mapped([rest[0], inside, *rest[1:], behind], known)
    further = request_of(Op.READ, 0)
    moved = image.do_moved([further], 4096)
    path.unlink()
    image.close()
    files.close()

    is_cached = not image.mode.startswith("O_DIRECT")
    assert [inside] * is_cached == done
    assert [(inside, 45056)] * (not is_cached) + [(behind, len(CONTENT))] == late, "nothing is there to be read at once"
    assert rest == left
    assert moved == (([further], []) if is_cached else ([], [further])), "direct I/O does nothing at once"
    assert {PENDING} == {each.status for each in (behind, *left)}
    assert (0, CONTENT[45056:49152]) == (inside.status, b"".join(inside.iov)) or not is_cached
