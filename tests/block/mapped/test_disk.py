"""Tests of `xenbackend.block.mapped.disk`, with a format whose tables the test makes."""

from __future__ import annotations

import errno
from random import Random

import pytest

from tests.helpers_block import Bottom, content, discard, flush, read, write
from tests.mapped_disk import CLUSTER, Plain, at
from xenbackend.block.driver import Geometry
from xenbackend.block.mapped.tables import OWNED, READABLE, SPECIAL, ZERO
from xenbackend.block.request import Op


def test_a_batch_stays_a_batch() -> None:
    """Requests whose clusters are in the file go to it as one batch, with the same memory, and keep their fields."""
    disk = Plain([at(0) | OWNED, at(1) | READABLE])
    disk.do(read(0, 512))  # loads the table
    batch = [write(512, b"w" * 1024), read(CLUSTER, 512, 512), read(0, CLUSTER)]
    before = [(request.offset, request.status, request.iov) for request in batch]
    disk.submit(list(batch))

    assert [at(0) + 512, at(1), at(0)] == [request.offset for request in disk.image.waiting]
    assert all(one.iov is other.iov for one, other in zip(disk.image.waiting, batch, strict=True))
    assert before == [(request.offset, request.status, request.iov) for request in batch]
    waiting, disk.image.waiting = disk.image.waiting, []
    for request in waiting:
        request.status = 0
    disk.image.complete(waiting)
    assert [batch] == disk.back


def test_requests_to_the_file_are_used_again() -> None:
    """There are never more requests of our own than were in flight at once, and idle ones keep no memory."""
    disk = Plain([at(number) | OWNED for number in range(8)])
    for _ in range(50):
        disk.do(*(read(number * CLUSTER, 512) for number in range(8)), flush())

    assert len(disk.io.moved) < 12
    assert {()} == {request.iov for request in disk.io.moved}


def test_neighbours_in_the_file_are_one() -> None:
    """A request over clusters that are adjacent in the file is not cut."""
    disk = Plain([at(0) | OWNED, at(0) + CLUSTER | OWNED, 0, 0])
    disk.do(read(0, 512))
    both = write(512, b"n" * CLUSTER)
    disk.submit([both])

    assert [(at(0) + 512, CLUSTER)] == [(request.offset, request.length) for request in disk.image.waiting]
    assert disk.image.step()
    assert b"n" * CLUSTER == disk.image.bytes[at(0) + 512 :][:CLUSTER]


def test_every_kind_of_cluster() -> None:
    """One read over clusters of every kind returns what each entry says."""
    entries = [at(0) | OWNED, ZERO, 0, at(3) | READABLE, SPECIAL, SPECIAL | 1 << 40, at(6) | OWNED, ZERO | at(7)]
    disk = Plain(entries)
    request = read(0, 8 * CLUSTER)
    mine = [bytes(disk.image.bytes[at(number) :][:CLUSTER]) for number in (0, 3, 6)]

    assert [0] == disk.do(request)
    zeros = bytes(CLUSTER)
    expected = [mine[0], zeros, zeros, mine[1], b"s" * CLUSTER, b"s" * CLUSTER, mine[2], zeros]
    assert b"".join(expected) == content(request)


def test_writes_that_need_a_place() -> None:
    """Writes to clusters that may not be overwritten go to the format, cut where owned clusters or a table end."""
    disk = Plain([0, ZERO, at(2) | READABLE, at(3) | OWNED, SPECIAL, 0, 0, 0])
    request = write(512, b"w" * (7 * CLUSTER))
    disk.submit([request])
    while disk.image.step():
        pass

    assert [(512, 3 * CLUSTER - 512), (4 * CLUSTER, 3 * CLUSTER + 512)] == [
        (part.offset, part.length) for part in disk.elsewhere
    ]
    assert [] == disk.back
    first, second = disk.elsewhere
    disk.io.in_thread(lambda: None, lambda _: [disk.io.finish(first, errno.ENOSPC), disk.io.finish(second, 0)][0])
    assert (errno.ENOSPC, [[request]]) == (request.status, disk.back)
    assert b"w" * CLUSTER == disk.image.bytes[at(3) :][:CLUSTER]


@pytest.mark.parametrize("parent_size", [512, 3 * CLUSTER + 512, 64 * CLUSTER])
def test_a_parent_of_any_size(parent_size: int) -> None:
    """Clusters that the image does not have come from the parent, and are zeros beyond its end."""
    disk, parent = Plain([0, at(1) | OWNED, 0, 0, 0, 0, 0, 0]), Bottom()
    disk.next, disk.below = parent, Geometry(parent_size)
    disk.check_parent(disk.below)
    assert disk.on_complete is not None
    request = read(0, 8 * CLUSTER)
    disk.submit([request])
    while disk.image.step():
        pass
    for batch in parent.batches:
        assert all(each.offset + each.length <= parent_size for each in batch)
        for each in batch:
            each.iov[0][:] = b"p" * each.length
            each.status = 0
        disk.on_complete(batch)

    expected = bytearray((b"p" * parent_size)[: 8 * CLUSTER].ljust(8 * CLUSTER, b"\0"))
    expected[CLUSTER : 2 * CLUSTER] = disk.image.bytes[at(1) :][:CLUSTER]
    assert [[request]] == disk.back
    assert (0, expected) == (request.status, content(request))


def test_a_request_that_is_all_the_parents_is_passed_on() -> None:
    """Requests that lie wholly in the parent are passed to it as they are, in one batch."""
    disk, parent = Plain([0, 0, ZERO, 0]), Bottom()
    disk.next = parent
    disk.check_parent(Geometry(4 * CLUSTER))
    disk.do(read(2 * CLUSTER, 512))
    batch = [read(0, 2 * CLUSTER), read(3 * CLUSTER, 512)]
    disk.submit(list(batch))

    assert [set(batch)] == list(map(set, parent.batches))


def test_a_table_is_loaded_once() -> None:
    """Requests wait for a table that is being loaded if they need it. If it cannot be read, they fail."""
    disk = Plain([at(number) | OWNED for number in range(8)])
    disk.do(read(4 * CLUSTER, 512))
    disk.submit([read(0, 512), read(CLUSTER, 512), read(5 * CLUSTER, 512)])
    disk.submit([read(2 * CLUSTER, 512)])
    assert [0] == [number for number, _ in disk.loading]

    disk.image.fails = lambda request: errno.EIO if request.offset == 0 else 0
    while disk.image.step():
        pass
    found = {request.offset // CLUSTER: request.status for batch in disk.back for request in batch}
    assert {0: errno.EIO, 1: errno.EIO, 2: errno.EIO, 5: 0} == found
    disk.back.clear()
    disk.image.fails = lambda _: 0
    assert [0] == disk.do(read(0, 512))


@pytest.mark.parametrize("seed", range(3))
def test_few_tables_are_enough(seed: int) -> None:
    """With room for one table only, every request ends and is right, however many tables it needs."""
    chance = Random(seed)
    places = chance.sample(range(64), 32)
    disk = Plain([place * CLUSTER | OWNED for place in places], limit=1)
    model = bytearray(b"".join(disk.image.bytes[place * CLUSTER :][:CLUSTER] for place in places))
    for _ in range(60):
        length = chance.randint(1, 100) * 512
        offset = chance.randrange(0, (len(model) - length) // 512 + 1) * 512
        if chance.random() < 0.5:
            data = chance.randbytes(length)
            model[offset : offset + length] = data
            assert [0] == disk.do(write(offset, data[:512], data[512:]) if length > 512 else write(offset, data))
        else:
            request = read(offset, length)
            assert [0] == disk.do(request)
            assert model[offset : offset + length] == content(request)
    assert len(disk.tables) <= 2


def test_a_request_across_any_number_of_tables() -> None:
    """A request that crosses thousands of tables ends, although only one of them is kept."""
    disk = Plain([at(0) | OWNED, *[ZERO] * 5999], limit=1)
    request = read(0, 6000 * CLUSTER)

    assert [0] == disk.do(request)
    assert disk.image.bytes[at(0) :][:CLUSTER] == content(request)[:CLUSTER]
    assert not any(content(request)[CLUSTER:])


@pytest.mark.parametrize("entry", [0, ZERO, ZERO | at(0), SPECIAL, at(0) | READABLE, at(0) | OWNED])
def test_flush_and_discard(entry: int) -> None:
    """A flush goes to the file. A discard goes to the format, whatever the clusters are."""
    disk = Plain([entry])
    disk.do(read(0, 512))  # loads the table

    assert [0, errno.EOPNOTSUPP] == disk.do(flush(), discard(0, CLUSTER))
    assert ["flush"] == [change.kind for change in disk.image.log]


def test_quiet_is_when_all_of_before_is_back() -> None:
    """`when_quiet` calls once all requests are back that the file had at that time, whatever has come since."""
    disk, heard = Plain([at(0) | OWNED]), list[str]()
    disk.do(read(0, 512))
    disk.submit([read(0, 512)])
    (before,) = disk.image.waiting
    disk.io.when_quiet(lambda: heard.append("quiet"))
    disk.submit([read(512, 512)])
    _, after = disk.image.waiting

    for request, expected in ((after, []), (before, ["quiet"])):
        request.status = 0
        disk.image.complete([request])
        assert expected == heard
    disk.io.when_quiet(lambda: heard.append("at once"))
    assert ["quiet", "at once"] == heard


def test_flushes_of_our_own_are_shared() -> None:
    """All who ask for a flush in one turn share it, and each of them learns if it fails."""
    disk, heard = Plain([0]), list[int]()
    disk.image.fails = lambda request: errno.EIO if request.op == Op.FLUSH else 0
    disk.io.soon(lambda: [disk.io.sync(heard.append) for _ in range(3)])
    disk.do(read(0, 512))

    assert [errno.EIO] * 3 == heard


def test_threads_give_a_status() -> None:
    """An OSError raised in a thread becomes the status, and requests that the callback makes are sent."""
    disk, heard = Plain([0]), list[int]()

    def fails() -> None:
        raise OSError(errno.ENOSPC, "full")

    disk.io.in_thread(fails, heard.append)
    disk.io.in_thread(lambda: None, lambda status: disk.io.write_meta(0, b"x" * 512, heard.append))
    while disk.image.step():
        pass
    assert ([errno.ENOSPC, 0], b"x" * 512) == (heard, disk.image.bytes[:512])
