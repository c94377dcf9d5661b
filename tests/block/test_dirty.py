"""The dirty map, compared with a plain set of pieces, across deaths, and at the sizes of real disks."""

from __future__ import annotations

import mmap
import os
from random import Random

import pytest

from xenbackend.block.dirty import (
    CHUNK_BITS,
    MAX_BITS,
    MAX_PAGE_RANGES,
    PAGE_CHUNKS,
    DirtyMap,
    Range,
    StalePageError,
    fitting,
    memory_size,
)
from xenbackend.block.request import Op, Request

CHUNK = CHUNK_BITS * 512  # bytes of disk
SIZE = 5 * CHUNK + 3 * 512  # the last chunk is nearly empty
TIB = 1 << 40


def new_map(size: int = SIZE, granularity: int = 512) -> DirtyMap:
    """Return an empty map in memory of its own."""
    return DirtyMap(memoryview(bytearray(memory_size(size, granularity))), size, granularity, is_tracking=True)


def request(op: Op, offset: int, length: int) -> Request:
    """Return a request for a range."""
    made = Request()
    made.op, made.offset, made.length = op, offset, length
    return made


def pieces(ranges: list[Range], granularity: int = 512) -> set[int]:
    """Return the numbers of the pieces that ranges cover, each of which must be covered once."""
    found = [
        piece
        for offset, length in ranges
        for piece in range(offset // granularity, -(-(offset + length) // granularity))
    ]
    assert len(found) == len(set(found))
    return set(found)


def peek_all(dirty: DirtyMap) -> list[Range]:
    """Return the ranges of every page."""
    found: list[Range] = []
    position = 0
    while position < dirty.size:
        ranges, position = dirty.peek(position)
        found += ranges
    return found


def take_all(dirty: DirtyMap) -> list[Range]:
    """Return the ranges of a whole sweep, acknowledging each page."""
    found, number = dirty.take()
    ranges = found
    while ranges:
        ranges, number = dirty.take(number)
        found = found + ranges
    return found


def random_range(random: Random, size: int) -> tuple[int, int]:
    """Return a random range of a shape that marking handles separately: pieces, bytes, chunks, across borders."""
    unit = random.choice((512, 512, 4096, 4096, CHUNK))
    first = random.randrange(size // unit)
    count = random.randrange(1, random.choice((2, 3, 20, 300)))
    return first * unit, min(count * unit, size - first * unit)


def test_take_keeps_what_is_in_flight_in_the_page_only() -> None:
    """Pieces with a request in flight stay dirty if the page hands them out. Pieces outside of the page get no mark."""
    dirty = new_map()
    for offset, length in ((0, 1024), (4096, 512), (8192, 512)):
        dirty.mark(offset, length)
    in_flight = [Range(512, 512), Range(1024, 512), Range(3584, 1024), Range(9216, 512), Range(SIZE - 512, 512)]
    ranges, number = dirty.take(None, in_flight)

    assert [Range(0, 1024), Range(4096, 512), Range(8192, 512)] == ranges
    dirty.take(number)
    assert [Range(512, 512), Range(3584, 1024)] == peek_all(dirty)


@pytest.mark.parametrize("granularity", [512, 4096])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_a_set_of_pieces(seed: int, granularity: int) -> None:
    """After any writes, discards, clears and takes, the map shows exactly the pieces that a set would hold."""
    random = Random(seed)
    dirty = new_map(granularity=granularity)
    model: set[int] = set()
    for _ in range(25):
        step = random.random()
        if step < 0.02:
            dirty.clear()
            model = set()
        elif step < 0.1:
            assert model == pieces(take_all(dirty), granularity)

            model = set()
        else:
            batch = []
            for _ in range(random.randrange(1, 5)):
                op = random.choice(list(Op))
                offset, length = (0, 0) if op is Op.FLUSH else random_range(random, SIZE)
                batch.append(request(op, offset, length))
                if op in (Op.WRITE, Op.DISCARD):
                    model |= pieces([Range(offset, length)], granularity)
            dirty.mark_changes(batch)

        assert model == pieces(peek_all(dirty), granularity)


def test_ranges_are_joined_and_end_with_the_disk() -> None:
    """Adjacent pieces are joined into one range, across chunks too, and the last range ends where the disk does."""
    dirty = new_map(size=2 * CHUNK + 512, granularity=4096)
    for offset in range(CHUNK - 8192, 2 * CHUNK, 4096):
        dirty.mark(offset, 4096)
    dirty.mark(2 * CHUNK, 512)

    assert [Range(CHUNK - 8192, CHUNK + 8192 + 512)] == peek_all(dirty)


def test_only_writes_and_discards_are_marked() -> None:
    """Reads and flushes mark nothing."""
    dirty = new_map()
    dirty.mark_changes([request(Op.READ, 0, 4096), request(Op.FLUSH, 0, 0)])

    assert ([], 0) == (peek_all(dirty), dirty.dirty_at_most())


def test_successor_finds_the_map() -> None:
    """A process that opens the same memory finds marks and tracking as the dead one left them."""
    memory = memoryview(bytearray(memory_size(SIZE, 512)))
    first = DirtyMap(memory, SIZE, 512, is_tracking=True)
    first.mark(4096, 8192)
    first.is_tracking = False

    second = DirtyMap(memory, SIZE, 512, is_tracking=True)

    assert ([Range(4096, 8192)], False) == (peek_all(second), second.is_tracking)


def test_memory_of_another_disk_is_not_believed() -> None:
    """Memory with a map of another size or granularity is cleared, even if it happens to have the right length."""
    memory = memoryview(bytearray(memory_size(SIZE, 512)))
    DirtyMap(memory, SIZE, 512, is_tracking=False).mark(0, SIZE)

    other = DirtyMap(memory, SIZE - 512, 512, is_tracking=True)

    assert ([], True) == (peek_all(other), other.is_tracking)


def test_unacknowledged_page_is_dirty_again() -> None:
    """A page that was not acknowledged is handed out again with what was written since, even after a death."""
    memory = memoryview(bytearray(memory_size(SIZE, 512)))
    dirty = DirtyMap(memory, SIZE, 512, is_tracking=True)
    dirty.mark(0, 4096)
    dirty.take()
    dirty.mark(8192, 512)

    successor = DirtyMap(memory, SIZE, 512, is_tracking=True)

    assert [Range(0, 4096), Range(8192, 512)] == peek_all(successor)
    assert [Range(0, 4096), Range(8192, 512)] == take_all(successor)
    assert [] == take_all(successor)


def test_write_after_its_range_was_handed_out_is_kept() -> None:
    """What is written between two pages of a sweep is in the next page. Acknowledging a page does not lose it."""
    dirty = new_map()
    dirty.mark(0, 4096)
    _, number = dirty.take()
    dirty.mark(0, 512)

    assert [] == dirty.take(number)[0]
    assert [Range(0, 512)] == take_all(dirty)


@pytest.mark.parametrize("is_written", [False, True])
def test_death_inside_take_loses_nothing(monkeypatch: pytest.MonkeyPatch, *, is_written: bool) -> None:
    """A process that dies just before or just after it has noted what it hands out leaves all of it dirty."""
    memory = memoryview(bytearray(memory_size(SIZE, 512)))
    dirty = DirtyMap(memory, SIZE, 512, is_tracking=True)
    dirty.mark(4096, 4096)
    hand_out = dirty._hand_out

    def die(ranges: list[Range]) -> None:
        if is_written:
            hand_out(ranges)
        raise KeyboardInterrupt

    monkeypatch.setattr(dirty, "_hand_out", die)
    with pytest.raises(KeyboardInterrupt):
        dirty.take()

    assert [Range(4096, 4096)] == take_all(DirtyMap(memory, SIZE, 512, is_tracking=True))


def test_second_reader_takes_the_sweep_over() -> None:
    """A second reader takes over the sweep: the first one's next acknowledgement, of an outdated page, is refused."""
    dirty = new_map()
    dirty.mark(0, 4096)
    _, number = dirty.take()
    dirty.take()

    with pytest.raises(StalePageError):
        dirty.take(number)


def test_clear_ends_a_sweep() -> None:
    """After `clear` the reader of an old page is refused, and what it did not acknowledge is forgotten."""
    dirty = new_map()
    dirty.mark(0, 4096)
    _, number = dirty.take()
    dirty.clear()

    with pytest.raises(StalePageError):
        dirty.take(number)
    assert [] == peek_all(dirty)


def test_pages_are_bounded_and_lose_nothing() -> None:
    """If every other piece is dirty, pages have at most MAX_PAGE_RANGES ranges, and each piece is in one of them."""
    dirty = new_map(size=4 * CHUNK)
    for offset in range(0, 4 * CHUNK, 1024):
        dirty.mark(offset, 512)
    counts = []
    ranges, number = dirty.take()
    while ranges:
        counts.append(len(ranges))
        ranges, number = dirty.take(number)

    assert 4 * CHUNK_BITS // 2 == sum(counts)
    assert max(counts) <= MAX_PAGE_RANGES


def test_whole_disk_discard_costs_no_bits() -> None:
    """A discard of 1 TiB needs no bits and is walked in pages of limited size, so a guest cannot stall its worker."""
    fd = os.memfd_create("dirty")
    os.ftruncate(fd, memory_size(TIB, 512))
    dirty = DirtyMap(memoryview(mmap.mmap(fd, memory_size(TIB, 512))), TIB, 512, is_tracking=True)
    dirty.mark(0, TIB)
    ranges, after = dirty.peek()
    allocated = os.fstat(fd).st_blocks * 512
    os.close(fd)

    assert TIB == dirty.dirty_at_most()
    assert ([Range(0, PAGE_CHUNKS * CHUNK)], PAGE_CHUNKS * CHUNK) == (ranges, after)
    assert allocated <= 1 << 20


@pytest.mark.parametrize("size", [0, 1, SIZE, TIB - 1, TIB, TIB + 1, 3 * TIB, 1 << 51, (1 << 51) + 512, (1 << 64) - 1])
@pytest.mark.parametrize("wanted", [512, 4096, 1 << 30])
@pytest.mark.rows("D8", "R12")
def test_a_map_is_bounded_whatever_size_an_image_claims(size: int, wanted: int) -> None:
    """R19, D8: a map takes at most 257 MiB, whatever size an image claims. Pieces have the wanted size if that fits,
    else the smallest size that does.
    """
    granularity = fitting(size, wanted)

    assert granularity >= wanted
    assert 0 == granularity & granularity - 1
    assert memory_size(size, granularity) <= MAX_BITS + (1 << 20)
    assert granularity == wanted or memory_size(size, granularity // 2) > MAX_BITS


def test_a_disk_of_pebibytes_is_tracked_in_little_memory() -> None:
    """On 2 PiB a new map touches a few hundred KiB, a write marks its own MiB, and the disk's end is tracked too."""
    size = 1 << 51
    granularity = fitting(size, 512)
    bytes_of_map = memory_size(size, granularity)
    fd = os.memfd_create("map")
    os.ftruncate(fd, bytes_of_map)
    dirty = DirtyMap(memoryview(mmap.mmap(fd, bytes_of_map)), size, granularity, is_tracking=True)
    dirty.mark(5 * granularity + 512, 512)
    dirty.mark(size - 512, 512)
    touched = os.fstat(fd).st_blocks * 512
    os.close(fd)

    assert [Range(5 * granularity, granularity), Range(size - granularity, granularity)] == peek_all(dirty)
    assert touched < 1 << 20
