"""Tests of `xenbackend.worker.files`: all ways of doing I/O against one model, locks, and what is refused."""

import errno
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from descriptors import open_descriptors

from tests import places
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.errors import DriverError
from xenbackend.kernel import blockdev, memory
from xenbackend.kernel.blockdev import Alignment
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.files import HostFiles
from xenbackend.worker.image import Image

SIZE = 1 << 20
WAYS = {
    "cached": {"direct": False},
    "cached, blocking": {"direct": False, "blocking": True},
    "direct": {"direct": True},
    "direct, blocking": {"direct": True, "blocking": True},
}


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


@pytest.fixture
def path() -> Iterator[str]:
    """Return the path of an image of 1 MiB of random bytes, on a disk even if tmp_path is in memory."""
    name = f"{places.DISK}/{places.prefix()}{os.getpid()}"
    Path(name).write_bytes(random.Random(0).randbytes(SIZE))
    yield name
    Path(name).unlink()


def serve(reactor: Reactor, image: Image, batches: list[list[Request]]) -> list[Request]:
    """Submit the batches at once, run until all requests are back, and return them in that order."""
    wanted = sum(len(batch) for batch in batches)
    back: list[Request] = []

    def complete(batch: list[Request]) -> None:
        back.extend(batch)
        if len(back) == wanted:
            reactor.call_soon(reactor.stop)

    image.complete = complete
    for batch in batches:
        image.submit(list(batch))
    reactor.run()
    return back


def request(op: Op, offset: int = 0, length: int = 0, iov: list[memoryview] | None = None, tag: int = 0) -> Request:
    """Return a request; without `iov`, memory for it is allocated in one piece."""
    made = Request(tag)
    made.op, made.offset, made.length = op, offset, length
    if op in {Op.READ, Op.WRITE}:
        made.iov = [memory.allocate(length).view] if iov is None else iov
    return made


def random_iov(chance: random.Random, length: int) -> list[memoryview]:
    """Return memory in pieces as guests have it: whole sectors, some pieces adjacent, in pages of their own."""
    pieces = []
    while length:
        room = chance.choice((512, 1024, 4096, 4096, 8192))
        shift = chance.randrange(0, room, 512) % 4096
        piece = memory.allocate(8192).view[shift : shift + min(room, length)]
        if len(piece) > 512 and chance.random() < 0.3:
            pieces += [piece[:512], piece[512:]]
        else:
            pieces.append(piece)
        length -= len(piece)
    return pieces


def random_batch(chance: random.Random, model: bytearray) -> tuple[list[Request], list[bytes | None]]:
    """Return requests that do not overlap and the expected data of each read, and apply the writes to the model."""
    batch: list[Request] = []
    expected: list[bytes | None] = []
    place = 0
    for _ in range(chance.randrange(1, 9)):
        place += chance.choice((0, 0, 512 * chance.randrange(64)))
        length = chance.choice((512, 4096, 4096, 512 * chance.randrange(1, 40)))
        if place + length > SIZE:
            break
        op = chance.choice((Op.READ, Op.READ, Op.WRITE, Op.WRITE, Op.DISCARD, Op.FLUSH))
        batch.append(request(op, place, length, random_iov(chance, length)))
        expected.append(bytes(model[place : place + length]) if op == Op.READ else None)
        if op == Op.WRITE:
            data = chance.randbytes(length)
            for view in batch[-1].iov:
                view[:], data = data[: len(view)], data[len(view) :]
            model[place : place + length] = b"".join(batch[-1].iov)
        elif op == Op.DISCARD:
            model[place : place + length] = bytes(length)
        place += length
    for each in batch:
        if each.op in {Op.FLUSH, Op.DISCARD}:
            each.iov = ()
        if each.op == Op.FLUSH:
            each.offset = each.length = 0
    return batch, expected


def check_against_model(reactor: Reactor, image: Image, path: str, seed: int) -> None:
    """Do random batches; compare every read with the model, and the file at the end."""
    chance = random.Random(seed)
    model = bytearray(Path(path).read_bytes())
    for _ in range(40):
        batch, expected = random_batch(chance, model)
        if not batch:
            continue
        back = serve(reactor, image, [batch])
        assert sorted(map(id, back)) == sorted(map(id, batch)), f"seed {seed}"
        for each, content in zip(batch, expected, strict=True):
            assert each.status == 0, f"seed {seed}: {each}"
            assert content is None or b"".join(each.iov) == content, f"seed {seed}: {each}"
    image.sync()
    assert Path(path).read_bytes() == model, f"seed {seed}"


@pytest.mark.parametrize("use_queues", [True, False], ids=["queues", "threads"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_way_against_a_model(reactor: Reactor, path: str, way: str, use_queues: bool, seed: int) -> None:
    """In each way of doing I/O, random requests read what was written, come back once, and leave the right file."""
    files = HostFiles(reactor, use_queues=use_queues)
    image = files.open(path, read_only=False, **WAYS[way])
    if not image.can_discard:
        pytest.skip("no holes in this file system")
    check_against_model(reactor, image, path, seed)

    image.close()
    files.close()


@pytest.mark.parametrize("use_queues", [True, False], ids=["queues", "threads"])
@pytest.mark.parametrize("blocking", [True, False])
def test_medium_of_larger_blocks(
    reactor: Reactor,
    path: str,
    use_queues: bool,
    blocking: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a medium with blocks of 4096 bytes, requests of single sectors are right too, in any mix with others."""
    monkeypatch.setattr(blockdev, "_stated_alignment", lambda _fd: Alignment(4096, 4096))
    files = HostFiles(reactor, use_queues=use_queues)
    image = files.open(path, read_only=False, blocking=blocking)
    check_against_model(reactor, image, path, 3)

    image.close()
    files.close()


def test_mode_says_what_was_chosen(reactor: Reactor, path: str) -> None:
    """`mode` names the way of doing I/O: O_DIRECT only if the file allows it, and AIO only if the host has it."""
    files, plain = HostFiles(reactor), HostFiles(reactor, use_queues=False)
    cached = HostFiles(reactor, direct=False)
    asked = ((files, {}), (plain, {}), (files, {"direct": False}), (files, {"blocking": True}), (cached, {}))
    modes = []
    for host, options in asked:
        image = host.open(path, read_only=True, **options)
        modes.append(image.mode)
        assert os.get_blocking(image.fd)  # otherwise asynchronous I/O answers EAGAIN instead of waiting
        image.close()
    files.close()
    cached.close()

    if not modes[0].startswith("O_DIRECT"):
        pytest.skip("no direct I/O there")
    assert modes[0] in {"O_DIRECT, Linux AIO", "O_DIRECT, threads"}
    page_cache = "page cache, preadv and pwritev"
    assert modes[1:] == ["O_DIRECT, threads", page_cache, "O_DIRECT, blocking calls", page_cache]


@pytest.mark.parametrize("way", WAYS)
def test_past_the_end(reactor: Reactor, path: str, way: str) -> None:
    """R10: a read past the end returns zeros for that part, a write or discard past it is refused, and the file never
    grows.
    """
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, **WAYS[way])
    half, beyond = (request(Op.READ, SIZE - 4096 + shift, 8192) for shift in (0, 8192))
    for each in (half, beyond):
        each.iov[0][:] = b"\xff" * 8192  # stands for another guest's data
    refused = [request(Op.WRITE, SIZE - 4096, 8192), request(Op.DISCARD, SIZE, 4096)]
    content = Path(path).read_bytes()

    serve(reactor, image, [[half, *refused, beyond]])

    assert (half.status, beyond.status) == (0, 0)
    assert bytes(half.iov[0]) == content[-4096:] + bytes(4096)
    assert bytes(beyond.iov[0]) == bytes(8192)
    assert [each.status for each in refused] == [errno.EINVAL, errno.EINVAL]
    assert Path(path).read_bytes() == content
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_growing(reactor: Reactor, path: str, way: str) -> None:
    """A file grows only on request, by zeros and a given tail, can be written there then, and never gets shorter."""
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, **WAYS[way])
    content = Path(path).read_bytes()

    image.grow(SIZE + 8192, b"t" * 512)
    image.grow(SIZE + 4096)
    assert (image.size, Path(path).read_bytes()) == (SIZE + 8192, content + bytes(8192 - 512) + b"t" * 512)

    image.grow(SIZE + 16384)
    write = request(Op.WRITE, SIZE + 12288, 4096)
    write.iov[0][:] = b"w" * 4096
    serve(reactor, image, [[write]])
    assert write.status == 0
    assert Path(path).read_bytes()[SIZE + 8192 :] == bytes(4096) + b"w" * 4096
    image.close()
    files.close()


@pytest.mark.parametrize("step", [0, 65536])
def test_part_of_a_block_that_is_new(reactor: Reactor, path: str, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """What was written where a file has grown survives a later write to another part of the same block."""
    monkeypatch.setattr(blockdev, "_stated_alignment", lambda _fd: Alignment(4096, 4096))
    os.truncate(path, SIZE - 8191)
    if not step:
        os.truncate(path, SIZE - 8192)
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, step=step)
    if not step:
        image.grow(SIZE)
    whole, part = request(Op.WRITE, SIZE - 4096, 4096), request(Op.WRITE, SIZE - 2048, 512)
    whole.iov[0][:] = b"w" * 4096
    part.iov[0][:] = b"p" * 512
    serve(reactor, image, [[whole], [part]])

    assert b"w" * 2048 + b"p" * 512 + b"w" * 1536 == Path(path).read_bytes()[SIZE - 4096 : SIZE]
    os.truncate(path, SIZE - 2048)
    gone = request(Op.READ, SIZE - 4096, 4096)
    serve(reactor, image, [[gone]])
    assert errno.EIO == gone.status
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_more_pieces_than_one_call_takes(reactor: Reactor, path: str, way: str) -> None:
    """A request with more pieces than IOV_MAX is done in full."""
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, **WAYS[way])
    arena = memory.allocate(2 * 1100 * 512)
    iov = [arena.view[place : place + 512] for place in range(0, 2 * 1100 * 512, 1024)]
    read, write = request(Op.READ, 4096, 1100 * 512, iov), request(Op.WRITE, 4096, 1100 * 512, iov[::-1])
    content = Path(path).read_bytes()[4096 : 4096 + 1100 * 512]

    serve(reactor, image, [[read]])
    found = b"".join(iov)
    serve(reactor, image, [[write]])

    assert (read.status, write.status) == (0, 0)
    assert found == content
    assert Path(path).read_bytes()[4096 : 4096 + 1100 * 512] == b"".join(iov[::-1])
    image.close()
    files.close()


def test_read_only_image_refuses_writes(reactor: Reactor, path: str) -> None:
    """An image that was opened read-only refuses writes, and offers no discard."""
    files = HostFiles(reactor)
    for way in WAYS.values():
        image = files.open(path, read_only=True, **way)
        write = request(Op.WRITE, 0, 4096)
        serve(reactor, image, [[write]])

        assert (write.status, image.can_discard) == (errno.EBADF, False)
        image.close()
    files.close()


@pytest.mark.parametrize("direct", [True, False])
def test_helpers_for_open(reactor: Reactor, path: str, direct: bool) -> None:
    """`read_at` and `write_at` accept any place and length, whatever the alignment of the medium."""
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, direct=direct)
    content = bytearray(Path(path).read_bytes())
    image.write_at(700, b"neither aligned nor a sector")
    content[700:728] = b"neither aligned nor a sector"
    image.sync()

    assert image.read_at(650, 100) == content[650:750]
    assert image.read_at(SIZE - 10, 100) == content[-10:]
    assert image.read_at(SIZE + 10, 100) == b""
    assert Path(path).read_bytes() == content
    with pytest.raises(OSError, match="past the end"):
        image.write_at(SIZE - 1, b"ab")
    image.close()
    files.close()


@pytest.mark.slow
@pytest.mark.parametrize("first_reads", [True, False])
@pytest.mark.parametrize("second_reads", [True, False])
def test_lock_between_processes(reactor: Reactor, path: str, first_reads: bool, second_reads: bool) -> None:
    """Readers share an image, and a writer has it alone, in any processes and order; the error names the holder."""
    files = HostFiles(reactor)
    image = files.open(path, read_only=first_reads)
    script = (
        "import sys\nfrom xenbackend.worker.files import HostFiles\nfrom xenbackend.loop.reactor import Reactor\n"
        f"try: HostFiles(Reactor()).open(sys.argv[1], read_only={second_reads})\n"
        "except Exception as error: print(error.errno, error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=True, text=True)
    expected = (
        r""
        if first_reads and second_reads
        else (
            rf"{errno.EBUSY} {path} is locked by .* \(process {os.getpid()}\); one writer at a time, or readers only\n"
        )
    )

    assert re.fullmatch(expected, ran.stdout)
    image.close()
    files.close()


def test_lock_ends_with_close(reactor: Reactor, path: str) -> None:
    """A closed image can be opened for writing again; a shareable one can be opened for writing twice."""
    files = HostFiles(reactor)
    files.open(path, read_only=False).close()
    image, other = (files.open(path, read_only=False, shareable=True) for _ in range(2))
    image.close()
    with pytest.raises(DriverError, match="locked"):
        files.open(path, read_only=False)
    other.close()
    files.open(path, read_only=False).close()
    files.close()


@pytest.mark.slow
def test_successor_waits_for_the_lock(reactor: Reactor, path: str) -> None:
    """A successor with a time-out gets the lock as soon as its predecessor's last file description is closed."""
    script = (
        "import sys\nfrom xenbackend.worker.files import HostFiles\nfrom xenbackend.loop.reactor import Reactor\n"
        "image = HostFiles(Reactor()).open(sys.argv[1], read_only=False)\nprint(1, flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdin=-1, stdout=-1) as predecessor:
        assert predecessor.stdout is not None
        predecessor.stdout.read(1)
        predecessor.kill()
        files = HostFiles(reactor, lock_timeout_s=30)
        image = files.open(path, read_only=False)
    image.close()
    files.close()


@pytest.mark.rows("A3")
def test_what_is_no_image_is_refused_and_closed(reactor: Reactor, tmp_path: Path) -> None:
    """A file that cannot be opened, or cannot be an image, is refused with its own error, and nothing stays open."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    files = HostFiles(reactor)
    before = open_descriptors()
    cases: list[tuple[str, type[Exception], str]] = [
        ("missing", FileNotFoundError, "No such file"),
        ("", DriverError, "is a directory"),
        ("pipe", DriverError, "is a pipe"),
        ("empty", DriverError, "is empty"),
    ]
    for name, kind, sentence in cases:
        for read_only in (True, False):
            with pytest.raises(kind, match=sentence):
                files.open(str(tmp_path / name), read_only=read_only)

    assert open_descriptors() == before


def test_files_of_formats_end_anywhere(reactor: Reactor, path: str) -> None:
    """With `step`, a file that ends inside a sector can be opened: unchanged for reading, made longer for writing."""
    os.truncate(path, 100_001)
    files = HostFiles(reactor)
    reader = files.open(path, read_only=True, step=65536)
    assert (100_001, 100_001) == (reader.size, Path(path).stat().st_size)
    reader.close()
    writer = files.open(path, read_only=False, step=65536)
    assert (131_072, 131_072) == (writer.size, Path(path).stat().st_size)
    writer.close()
    files.close()


@pytest.mark.parametrize("end", [SIZE - 511, SIZE - 1, SIZE - 4000, 100])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_ends_inside_a_sector(reactor: Reactor, path: str, way: str, end: int) -> None:
    """A reader sees the last sector as whole: the missing part is zeros, in whatever requests it is read. A writer is
    refused.
    """
    os.truncate(path, end)
    model = Path(path).read_bytes().ljust(-(-end // 512) * 512 + 8192, b"\0")
    files = HostFiles(reactor)
    image = files.open(path, read_only=True, **WAYS[way])
    whole = -(-end // 512) * 512
    chance = random.Random(end)
    batch = [request(Op.READ, place, 512) for place in range(max(0, whole - 4096), whole, 512)]  # adjacent requests
    batch += [request(Op.READ, chance.randrange(whole // 512) * 512, 512 * chance.randint(1, 16)) for _ in range(50)]
    batch += [request(Op.READ, 0, whole), request(Op.READ, 0, whole + 4096)]
    for each in batch:
        each.iov[0][:] = b"\xff" * each.length
    serve(reactor, image, [batch])

    assert whole == image.size
    assert [0] * len(batch) == [each.status for each in batch]
    for each in batch:
        assert model[each.offset : each.offset + each.length] == bytes(each.iov[0])
    assert model[whole - 512 : whole] == image.read_at(whole - 512, 4096)
    image.close()
    with pytest.raises(DriverError, match="not a multiple of its 512 byte sectors; attach the disk read-only"):
        files.open(path, read_only=False, **WAYS[way])
    assert end == Path(path).stat().st_size
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_what_has_gone_of_an_odd_file(reactor: Reactor, path: str, way: str) -> None:
    """Zeros stand only for what the file never had; reading what it has lost since it was opened is an error."""
    os.truncate(path, SIZE - 100)
    files = HostFiles(reactor)
    image = files.open(path, read_only=True, **WAYS[way])
    os.truncate(path, SIZE - 101)
    batch = [request(Op.READ, SIZE - 512, 512), request(Op.READ, SIZE - 512, 4096), request(Op.READ, SIZE - 1024, 512)]
    serve(reactor, image, [batch])

    assert [errno.EIO, errno.EIO, 0] == [each.status for each in batch]
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_larger_sectors_than_the_medium(reactor: Reactor, path: str, way: str) -> None:
    """A file that ends inside a sector of 4096 bytes is read like one that ends inside a sector of 512."""
    os.truncate(path, SIZE - 512)
    model = Path(path).read_bytes() + bytes(512)
    files = HostFiles(reactor)
    image = files.open(path, read_only=True, sector_size=4096, **WAYS[way])
    batch = [request(Op.READ, SIZE - 4096, 4096), request(Op.READ, SIZE - 65536, 65536)]
    serve(reactor, image, [batch])

    assert (SIZE, 4096, [0, 0]) == (image.size, image.sector_size, [each.status for each in batch])
    assert [model[-4096:], model[-65536:]] == [bytes(each.iov[0]) for each in batch]
    image.close()
    files.close()


def test_close_leaves_nothing_open(reactor: Reactor, path: str) -> None:
    """Closing images and files leaves no descriptor and no hook in the loop."""
    before = open_descriptors()
    files = HostFiles(reactor)
    image = files.open(path, read_only=False)
    serve(reactor, image, [[request(Op.READ, 0, 4096), request(Op.FLUSH)]])
    image.close()
    files.close()

    assert open_descriptors() == before
    assert reactor._hooks == []


def test_status_is_set_before_it_is_given_back(reactor: Reactor, path: str) -> None:
    """D1, D6: no request comes back with a status that says it is still pending."""
    files = HostFiles(reactor)
    for way in WAYS.values():
        image = files.open(path, read_only=False, **way)
        back = serve(reactor, image, [[request(op, 0, 4096) for op in (Op.READ, Op.WRITE)], [request(Op.FLUSH)]])

        assert PENDING not in {each.status for each in back}
        image.close()
    files.close()


def test_what_a_file_has_lost_is_no_hole(reactor: Reactor, path: str) -> None:
    """What a file has lost since it was opened is an error and no hole; a hole at its end still is one."""
    os.truncate(path, 2 * SIZE)
    files = HostFiles(reactor)
    image = files.open(path, read_only=True)
    assert (2 * SIZE, 2 * SIZE) == image.next_data(SIZE)

    os.truncate(path, SIZE)
    with pytest.raises(OSError, match="become shorter"):
        image.next_data(SIZE)
    image.close()
    files.close()


@pytest.mark.parametrize("neighbours", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_another_program_makes_shorter(reactor: Reactor, path: str, way: str, neighbours: int) -> None:
    """No write makes such a file grow again: what was lost stays an error, even if another program then makes the file
    longer. The next flush fails once, a sentence says what happened, once, and the rest of the file is in service.
    """
    model = Path(path).read_bytes()
    files = HostFiles(reactor)
    said: list[str] = []
    files.on_short = said.append
    image = files.open(path, read_only=False, **WAYS[way])
    os.truncate(path, 65536)
    late = [request(Op.WRITE, SIZE - (each + 1) * 4096, 4096) for each in reversed(range(neighbours))]
    early = [request(Op.WRITE, each * 4096, 4096) for each in range(neighbours)]
    flush = request(Op.FLUSH)
    serve(reactor, image, [[*late, *early]])
    serve(reactor, image, [[flush]])
    assert [[errno.EIO] * neighbours, [0] * neighbours] == [[one.status for one in each] for each in (late, early)]
    assert (errno.EIO, 65536) == (flush.status, Path(path).stat().st_size)

    os.truncate(path, SIZE)
    reads = [request(Op.READ, SIZE - 4096, 4096), request(Op.READ, 61440, 4096), request(Op.READ, 61440, 8192)]
    others = [request(Op.WRITE, SIZE - 4096, 4096), request(Op.DISCARD, SIZE - 4096, 4096), request(Op.FLUSH)]
    serve(reactor, image, [reads, others])
    assert [errno.EIO, 0, errno.EIO] == [each.status for each in reads]
    assert [errno.EIO, errno.EIO, 0] == [each.status for each in others]
    assert model[61440:65536] == bytes(reads[1].iov[0])
    for call in (lambda: image.write_at(SIZE - 4096, b"x"), lambda: image.grow(2 * SIZE)):
        with pytest.raises(OSError, match="become shorter"):
            call()
    assert [f"{path} has become shorter: it has 65536 of {SIZE} bytes"] == [each.split(",")[0] for each in said]
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_off_while_it_is_opened(
    reactor: Reactor, path: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """F2: a file of which another program cuts off the end while we open it is not made as long again, so what was lost
    is an error.
    """
    examine = blockdev.examine

    def examine_before_it_is_cut_off(*arguments: Any, **named: Any) -> blockdev.Medium:
        medium = examine(*arguments, **named)
        os.truncate(path, 65536)
        return medium

    monkeypatch.setattr(blockdev, "examine", examine_before_it_is_cut_off)
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, step=65536, **WAYS[way])
    reads = [request(Op.READ, 61440, 4096), request(Op.READ, SIZE - 4096, 4096)]
    serve(reactor, image, [reads])

    assert [0, errno.EIO] == [each.status for each in reads]
    assert 65536 == Path(path).stat().st_size
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_flush_looks_for_what_was_lost(reactor: Reactor, path: str, way: str) -> None:
    """F2: a flush fails if another program has made the file shorter, even if nothing was written since."""
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, **WAYS[way])
    os.truncate(path, 65536)
    flush = request(Op.FLUSH)
    serve(reactor, image, [[flush]])
    image.close()
    files.close()

    assert errno.EIO == flush.status


def test_a_file_that_is_shorter_is_not_taken_over(reactor: Reactor, path: str) -> None:
    """F2: another chain of the same disk must not open a file that has become shorter in service: its new end would be
    that of the disk, and what was lost would be read as zeros.
    """
    files = HostFiles(reactor)
    image = files.open(path, read_only=False)
    files.check_free(path, read_only=False, shareable=False)
    os.truncate(path, 65536)
    with pytest.raises(DriverError, match=f"it has 65536 of the {SIZE} bytes .* the rest; detach the disk"):
        files.check_free(path, read_only=False, shareable=False)
    image.close()
    files.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_file_whose_size_nobody_knows_any_more(reactor: Reactor, path: str, way: str) -> None:
    """D6: if the file system has failed so that not even the file's size is known, each request ends with the error,
    which the disk's policies can handle; `submit` raises nothing.
    """
    files = HostFiles(reactor)
    image = files.open(path, read_only=False, **WAYS[way])
    fd = os.dup(image.fd)
    os.close(image.fd)
    batch = [request(Op.WRITE, 0, 4096), request(Op.WRITE, 8192, 4096), request(Op.FLUSH)]
    serve(reactor, image, [batch])
    os.dup2(fd, image.fd)
    os.close(fd)

    assert [errno.EBADF] * 3 == [each.status for each in batch]
    image.close()
    files.close()


def test_an_image_was_changed_when_others_changed_it(reactor: Reactor, path: str) -> None:
    """`look` returns when others last changed an image: the time from before we opened it, which itself changes it."""
    os.utime(path, ns=(10**9, 10**9))
    files = HostFiles(reactor)
    image = files.open(path, read_only=False)

    assert 10**9 == files.look(path).mtime_ns
    image.close()
    assert Path(path).stat().st_mtime_ns == files.look(path).mtime_ns
    files.close()


def test_a_check_of_an_image_in_use_leaves_its_times(
    reactor: Reactor, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check sets back no time of an image that a guest uses: it refuses the image before it looks closer, so the time
    of what the guest writes meanwhile stays.
    """
    files, check = HostFiles(reactor), HostFiles(reactor, changes=False)
    image = files.open(path, read_only=False)
    written = [10**9]
    os.utime(path, ns=(written[0], written[0]))
    examine = blockdev.examine

    def examine_while_a_guest_writes(*arguments: Any, **named: Any) -> blockdev.Medium:
        medium = examine(*arguments, **named)
        written.append(2 * 10**9)
        os.utime(path, ns=(written[-1], written[-1]))
        return medium

    monkeypatch.setattr(blockdev, "examine", examine_while_a_guest_writes)
    with pytest.raises(DriverError, match="is locked by another process"):
        check.open(path, read_only=False)
    image.close()
    for each in (files, check):
        each.close()

    assert written[-1] == Path(path).stat().st_mtime_ns
