"""Tests of `xenbackend.worker.direct` and `io_queue`; test_files.py checks contents against a model."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import places
from xenbackend.block.request import Op, Request
from xenbackend.errors import KernelError
from xenbackend.kernel import blockdev, memory
from xenbackend.kernel.blockdev import Alignment
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.direct import DirectImage
from xenbackend.worker.io_queue import DirectQueue

SIZE = 1 << 20


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture(params=["aio", "threads"])
def image(reactor: Reactor, request: pytest.FixtureRequest) -> Iterator[DirectImage]:
    """Return a direct image of zeros, as on a medium with blocks of 4096 bytes."""
    fd = os.open("/var/tmp", os.O_RDWR | os.O_TMPFILE)
    os.pwrite(fd, bytes(SIZE), 0)
    medium = blockdev.examine(fd, "image", read_only=False)
    try:
        queue = DirectQueue(reactor) if request.param == "aio" else None
    except KernelError as error:
        pytest.skip(str(error))
    if blockdev.switch_to_direct(fd, medium) is None:
        pytest.skip("no direct I/O there")
    made = DirectImage(fd, medium, Alignment(512, 4096), reactor, queue)
    yield made
    made.close()
    if queue is not None:
        queue.close()


def write_of(offset: int, content: bytes, iov: list[memoryview] | None = None) -> Request:
    """Return a write of `content`."""
    request = Request()
    request.op, request.offset, request.length = Op.WRITE, offset, len(content)
    if iov is None:
        iov = [memory.allocate(len(content)).view]
        iov[0][:] = content
    request.iov = iov
    return request


def serve(reactor: Reactor, image: DirectImage, batch: list[Request]) -> list[Request]:
    """Submit a batch, run until all of it is back, and return it in the order in which it came back."""
    back: list[Request] = []

    def complete(done: list[Request]) -> None:
        back.extend(done)
        if len(back) == len(batch):
            reactor.call_soon(reactor.stop)

    image.complete = complete
    image.submit(list(batch))
    reactor.run()
    return back


def test_parts_of_one_block_do_not_overwrite_each_other(reactor: Reactor, image: DirectImage) -> None:
    """Writes of single sectors of one block, in flight together with whole blocks around them, are all kept."""
    batch = [write_of(8192 + n * 512, bytes([65 + n]) * 512) for n in range(8)]
    whole = [write_of(place, b"w" * 4096) for place in (4096, 12288)]
    back = serve(reactor, image, [whole[0], *batch[:5], whole[1], *batch[5:]])

    assert [each.status for each in back] == [0] * 10
    assert image.read_at(4096, 12288) == b"w" * 4096 + b"".join(bytes([65 + n]) * 512 for n in range(8)) + b"w" * 4096


def test_part_waits_until_it_is_alone(reactor: Reactor, image: DirectImage) -> None:
    """A write of part of a block begins when earlier requests for it are done, and later ones begin after it."""
    batch = [write_of(0, b"a" * 4096), write_of(512, b"b" * 512), write_of(0, b"c" * 4096), write_of(1024, b"d" * 512)]
    back = serve(reactor, image, batch)

    assert back == batch
    assert image.read_at(0, 4096) == b"c" * 1024 + b"d" * 512 + b"c" * 2560


def test_memory_that_the_medium_cannot_use(reactor: Reactor, image: DirectImage) -> None:
    """Requests with memory at odd addresses are done too."""
    arena = memory.allocate(4 * 4096).view
    arena[3:4099] = b"odd!" * 1024
    write = write_of(4096, b"odd!" * 1024, [arena[3:1003], arena[1003:4099]])
    read = write_of(4096, bytes(4096), [arena[8193:9000], arena[9000:12289]])
    read.op = Op.READ
    serve(reactor, image, [write])
    serve(reactor, image, [read])

    assert (write.status, read.status) == (0, 0)
    assert bytes(arena[8193:12289]) == b"odd!" * 1024
    assert image.read_at(4096, 4096) == b"odd!" * 1024


_WRITER = """
import sys
from xenbackend.block.request import Op, Request
from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Alignment
from xenbackend.worker.files import HostFiles
from xenbackend.loop.reactor import Reactor

blockdev._stated_alignment = lambda fd: Alignment(512, 4096)
reactor = Reactor()
files = HostFiles(reactor)
reactor.before_sleep(files.kick)
image = files.open(sys.argv[1], read_only=False)
print(image.mode, flush=True)
left, number = 0, int(sys.argv[2])

def again(done=()):
    global left, number
    left -= len(done)
    if left:
        return
    left, number, batch = 6, number + 1, []
    for sector in range(1, 7):
        request = Request()
        request.op, request.offset, request.length = Op.WRITE, sector * 512, 512
        request.iov = [memoryview(bytearray([number % 256]) * 512)]
        batch.append(request)
    image.submit(batch)

image.complete = lambda done: (again(done), None)
again()
reactor.run()
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_block() -> None:
    """After a kill during writes of parts of a block, each of those sectors is old or new, and no other changed."""
    with places.directory(places.DISK) as directory:
        path = directory / "image"
        path.write_bytes(b"k" * 4096 + bytes(4096))
        for number in (1, 60, 120):
            before = sectors_of(path)
            with subprocess.Popen([sys.executable, "-c", _WRITER, path, str(number)], stdout=-1, text=True) as writer:
                assert writer.stdout is not None
                if "O_DIRECT" not in (mode := writer.stdout.readline()):
                    writer.kill()
                    pytest.skip(f"no direct I/O there: {mode}")
                while any(old == new for old, new in zip(before[1:7], sectors_of(path)[1:7], strict=True)):
                    os.sched_yield()
                writer.kill()
            found = sectors_of(path)

            assert [b"k" * 512] * 2 == [found[0], found[7]]
            assert [sector[:1] * 512 for sector in found] == found
            assert len({sector[0] for sector in found[1:7]}) <= 2


def sectors_of(path: Path) -> list[bytes]:
    """Return the sectors of the first block."""
    data = path.read_bytes()
    return [data[place : place + 512] for place in range(0, 4096, 512)]


def test_submitting_from_complete(reactor: Reactor, image: DirectImage) -> None:
    """D5: requests may be submitted from `complete`, even while others are held back."""
    done: list[Request] = []

    def complete(batch: list[Request]) -> None:
        done.extend(batch)
        if len(done) == 30:
            reactor.call_soon(reactor.stop)
        elif len(done) < 28:
            image.submit([write_of(len(done) * 512, b"x" * 512)])

    image.complete = complete
    image.submit([write_of(0, b"w" * 4096), write_of(4096, b"x" * 512), write_of(8192, b"w" * 4096)])
    reactor.run()

    assert [each.status for each in done] == [0] * 30
