"""Tests of `xenbackend.worker.io_queue` with the real kernel, skipped if it has no asynchronous I/O for us."""

import os
from collections.abc import Callable, Iterator

import pytest

from xenbackend.block.request import Op, Request
from xenbackend.errors import KernelError
from xenbackend.kernel import blockdev, memory
from xenbackend.kernel.aio import Aio
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.image import Image
from xenbackend.worker.io_queue import CachedQueue, DirectQueue


class Taker(Image):
    """An image whose requests all go to the queue."""

    def submit(self, batch: list[Request]) -> None:
        """Start every request."""
        for request in batch:
            self.start(request)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture(params=[DirectQueue, CachedQueue])
def image(reactor: Reactor, request: pytest.FixtureRequest) -> Iterator[Image]:
    """Return an image of 64 pages, each filled with its number."""
    fd = os.memfd_create("image")
    os.pwrite(fd, b"".join(bytes([number]) * 4096 for number in range(64)), 0)
    try:
        queue = request.param(reactor)
    except KernelError as error:
        pytest.skip(str(error))
    made = Taker(fd, blockdev.examine(fd, "image", read_only=False), None, reactor, queue)
    yield made
    made.close()
    queue.close()


def reads(count: int) -> list[Request]:
    """Return reads of the first pages, one page each."""
    batch = []
    for number in range(count):
        request = Request(number)
        request.op, request.offset, request.length = Op.READ, number * 4096, 4096
        request.iov = [memory.allocate(4096).view]
        batch.append(request)
    return batch


def run_until_back(reactor: Reactor, image: Image, count: int) -> list[Request]:
    """Run until `count` requests are back."""
    back: list[Request] = []
    image.complete = lambda batch: (back.extend(batch), len(back) >= count and reactor.stop())
    reactor.run()
    return back


def test_numbers_are_used_again(reactor: Reactor, image: Image) -> None:
    """The table of requests grows to the number in flight at once, and no further."""
    for _ in range(20):
        batch = reads(10)
        image.submit(batch)
        back = run_until_back(reactor, image, 10)

        assert sorted(each.tag for each in back) == list(range(10))
        assert [(each.status, each.iov[0][4095]) for each in batch] == [(0, number) for number in range(10)]
    assert image._queue is not None
    assert len(image._queue._lent) == 10
    assert image._queue._lent == [None] * 10


def test_idle_queue_lets_the_loop_sleep(reactor: Reactor, image: Image) -> None:
    """When nothing is in flight any more, the loop sleeps."""
    image.submit(reads(4))
    run_until_back(reactor, image, 4)
    passes: list[int] = []
    reactor.before_sleep(lambda: bool(passes.append(1)))
    reactor.call_later(0.05, reactor.stop)
    reactor.run()

    assert len(passes) <= 4


@pytest.mark.parametrize("image", [DirectQueue], indirect=True)
def test_submitted_by_eights_and_before_sleeping(
    reactor: Reactor, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are submitted eight at a time, and the rest in the call in which the loop sleeps, together with its
    poll.
    """
    calls: list[int] = []
    waits: list[int] = []
    submit, wait = Aio.submit, Aio.wait

    def count(ring: Aio) -> None:
        calls.append(ring.queued)
        submit(ring)

    def count_wait(ring: Aio, timeout_s: float | None) -> None:
        waits.append(ring.queued)
        wait(ring, timeout_s)

    monkeypatch.setattr(Aio, "submit", count)
    monkeypatch.setattr(Aio, "wait", count_wait)
    image.submit(reads(19))
    run_until_back(reactor, image, 19)

    assert calls == [8, 8, 3 + 1]
    assert waits[0] == 3 + 1


@pytest.mark.parametrize("image", [DirectQueue], indirect=True)
def test_pieces_side_by_side_are_one(reactor: Reactor, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjacent views are one piece for the disk, whether their addresses were noted or have to be asked for."""
    vectors: list[int] = []
    queue_vector = Aio.queue_vector

    def count(ring: Aio, opcode: int, fd: int, offset: int, iovecs: list[int], user_data: int) -> None:
        vectors.append(len(iovecs) // 2)
        queue_vector(ring, opcode, fd, offset, iovecs, user_data)

    monkeypatch.setattr(Aio, "queue_vector", count)
    arena = memory.allocate(8 * 4096).view
    pages = [arena[place : place + 4096] for place in range(0, 8 * 4096, 4096)]
    memory.note(pages[:4])
    batch = reads(2)
    for request, iov in zip(batch, (pages[:3], [pages[4], pages[5], pages[7]]), strict=True):
        request.length, request.iov = 3 * 4096, iov
    image.submit(batch)
    run_until_back(reactor, image, 2)
    memory.forget(pages)

    assert vectors == [2]
    assert [page[0] for page in pages] == [0, 1, 2, 0, 1, 2, 0, 3]


@pytest.mark.parametrize("image", [DirectQueue], indirect=True)
def test_bug_of_one_image_does_not_cost_the_others_theirs(reactor: Reactor, image: Image) -> None:
    """Completed requests of other images come back even if the first image's owner raises an exception."""
    assert image._queue is not None
    fd = os.memfd_create("other")
    os.truncate(fd, 64 * 4096)
    other = Taker(fd, blockdev.examine(fd, "other", read_only=False), None, reactor, image._queue)
    back: list[Request] = []
    failed: list[Image] = []

    def taker(each: Image) -> Callable[[list[Request]], None]:
        def take(batch: list[Request]) -> None:
            if not failed:
                failed.append(each)
                raise ValueError("a bug of ours")
            back.extend(batch)
            reactor.stop()

        return take

    for each in (image, other):
        each.complete = taker(each)
        each.submit(reads(2))
    while image._queue.in_flight:
        image._queue.wait(None)
    with pytest.raises(ValueError, match="a bug of ours"):
        image._queue.deliver()
    reactor.run()
    other.close()

    assert len(back) == 2
