"""A write-back cache whose FILE gives errors. Requests that need FILE wait, and all others go past it."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests.block.test_write_back import OPS, SHAPES, Life
from tests.helpers_block import again, content, discard, flush, read, write
from xenbackend.block.request import CACHE_LOST, Op, Request


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE, Op.FLUSH])
def test_an_error_of_file_pauses_what_needs_it(tmp_path: Path, op: int) -> None:
    """F4: a request for a block that only FILE holds ends with an error that every policy waits for, until FILE is
    back. Other requests go past FILE.
    """
    life = Life(tmp_path, Random(1))
    assert [0] == life.disk.do(write(0, b"d" * 4096))
    life.file.fails = lambda request: errno.EIO if request.op == op else 0
    for number in range(40):
        place = 4096 * (1 + number % 30)
        requests = [write(place, b"c" * 512), read(place, 512)]
        assert [0, 0] == [*life.disk.do(requests[0]), *life.disk.do(requests[1])] or op == Op.READ
    lost = (read(0, 512), write(0, b"e" * 512))
    assert [CACHE_LOST * (op == Op.READ), CACHE_LOST * (op == Op.WRITE)] == life.disk.do(*lost)
    if op == Op.FLUSH:
        assert [errno.EIO] == life.disk.do(flush())
    life.file.fails = lambda request: 0
    assert {0} == set(life.disk.do(*(again(each) for each in lost)))
    life.settle()

    assert life.image.bytes == life.disk.everything()
    assert b"e" * 512 + b"d" * 3584 == life.image.bytes[:4096]


def test_a_slot_that_cannot_be_read_says_nothing_of_another_one(tmp_path: Path) -> None:
    """F2: a read from FILE fails after its block was discarded and written again, to another slot. The read is answered
    from the new slot, and that slot's block is not given up.
    """
    life = Life(tmp_path, Random(1))
    assert [0] == life.disk.do(read(0, 4096))
    late = read(0, 512)
    life.disk.chain.submit([late])
    (held,), life.file.waiting = life.file.waiting, []
    assert [0, 0] == [*life.disk.do(discard(0, 4096)), *life.disk.do(write(0, b"n" * 4096))]
    held.status = errno.EIO
    life.file.complete([held])
    life.run()
    assert (0, b"n" * 512) == (late.status, content(late))
    assert b"n" * 4096 == life.disk.everything()[:4096]
    life.kill()

    assert [0] == life.disk.do(write(0, b"m" * 512))
    assert b"m" * 512 + b"n" * 3584 == life.disk.everything()[:4096]


def dead_for_writes(life: Life) -> None:
    """Let every write to FILE fail from now on."""
    life.file.fails = lambda request: errno.EIO if request.op == Op.WRITE else 0


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_clean_block_goes_past_a_file_that_fails(tmp_path: Path, *, is_written: bool, is_killed: bool) -> None:
    """F4: a block that was read, or written and destaged, is complete in the layer below. A write or discard of a part
    of it, a write that includes its neighbours, and a flush succeed without FILE.
    """
    life = Life(tmp_path, Random(1), block="16K")
    model = bytearray(life.first)
    if is_written:
        model[: 16 << 10] = b"o" * (16 << 10)
        assert [0] == life.disk.do(write(0, b"o" * (16 << 10)))
        life.settle()
        assert [0] == life.disk.do(flush())
    assert [0] == life.disk.do(read(0, 512))
    for place, data in ((512, b"a" * 512), (1024, b"b" * (32 << 10)), (2048, bytes(4096))):
        assert [0] == life.disk.do(read(place, 512))
        dead_for_writes(life)
        request = write(place, data) if any(data) else discard(place, len(data))
        life.disk.chain.submit([request])
        if is_killed:
            life.disk.step()
            life.kill()
            dead_for_writes(life)
            request = again(request)
        assert [0] == (life.disk.do(request) if is_killed else life.disk.do(flush()))
        model[place : place + len(data)] = data
        assert (0, 0) == (request.status, life.figures()["dirty"])
        life.file.fails = lambda request: 0
        assert model == life.image.bytes == life.disk.everything()
    assert [0] == life.disk.do(flush())
    life.memories.clear()
    life.start()

    assert model == life.disk.everything()


@pytest.mark.parametrize("failing", range(3))
def test_writes_to_one_clean_block_of_which_one_fails(tmp_path: Path, failing: int) -> None:
    """F2: several writes to one clean block are under way and one of them fails. What the others wrote stays in FILE or
    goes below, in any order of steps.
    """
    for seed in range(30):
        life = Life(tmp_path, Random(seed), block="16K")
        assert [0] == life.disk.do(read(0, 512))
        written = [0]

        def fails(request: Request, life: Life = life, written: list[int] = written) -> int:
            is_data = request.op == Op.WRITE and request.offset >= life.writer._data_at
            written[0] += is_data
            return errno.EIO if is_data and written[0] == failing + 1 else 0

        life.file.fails = fails
        requests = [write(place, bytes([1 + place // 512]) * 512) for place in (0, 512, 4096)]
        requests.append(discard(8192, 512))
        life.disk.chain.submit(requests)
        model = bytearray(life.first)
        for each in requests:
            model[each.offset : each.offset + 512] = content(each) if each.op == Op.WRITE else bytes(512)
        for _ in range(life.chance.randint(0, 8)):
            life.disk.step()
        lost = [each for each in requests if each not in life.disk.back or each.status == CACHE_LOST]
        if life.chance.random() < 0.5:
            life.kill()
        else:
            life.run()
            lost = [each for each in lost if each.status == CACHE_LOST]
        life.file.fails = lambda request: 0
        assert {0} == set(life.disk.do(flush(), *(again(each) for each in lost)))
        assert model == life.disk.everything(), seed
        life.settle()
        assert model == life.image.bytes == life.disk.everything(), seed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_killed_anywhere_while_file_gives_errors(tmp_path: Path, seed: int, block: str, size: int) -> None:
    """D11, F4: a third of the writes to FILE fail, torn. A write that cannot go past FILE waits and is done again.
    After a kill no read returns data older than an answered write, whether they are in FILE or below.
    """
    chance = Random(seed)
    life = Life(tmp_path, chance, block=block, size=size)
    model = bytearray(life.first)
    life.fails_at_times(0.3)
    for _ in life.die(40, model, ops=OPS, longest=chance.choice([40, 300]), rests=0.3, waits=CACHE_LOST):
        assert model == life.disk.everything()
        life.fails_at_times(0.3)
    life.file.fails = lambda request: 0
    life.settle()

    assert model == life.disk.everything() == life.image.bytes
    assert not any(life.writer.map.pins)
