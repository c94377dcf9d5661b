"""When dirty blocks go to the layer below. tests/block/test_write_back.py tests it with kills and power loss."""

from __future__ import annotations

import errno
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests.block.test_write_back import Life
from tests.helpers_block import Machine, discard, flush, read, write
from xenbackend.block.destage import REST_S
from xenbackend.block.drivers.cache import Cache
from xenbackend.block.request import Op, Request
from xenbackend.block.write_back import WriteBack

BLOCK = 4096


def below(life: Life) -> int:
    """Return how many blocks have been written below, after everything that can be done without a timer."""
    life.run()
    return sum(each.kind == "write" for each in life.image.log)


def pass_time(life: Life, seconds: float) -> None:
    """Let time pass in small steps."""
    for _ in range(round(seconds / 0.25)):
        life.time += 0.25
        for env in life.envs:
            env.ring()
        life.run()


def test_a_block_rests_before_it_goes_below(tmp_path: Path) -> None:
    """A block is written below once it has rested, and only once if it was written often. With nothing dirty, nothing
    is sent to the media.
    """
    life = Life(tmp_path, Random(1))
    for _ in range(10):
        assert [0] == life.disk.do(write(0, b"n" * BLOCK))
    pass_time(life, REST_S - 0.5)
    assert 0 == below(life)
    pass_time(life, 1.5)
    assert 1 == below(life)
    pass_time(life, 1)
    logged = len(life.image.log), len(life.file.log)
    pass_time(life, 20)

    assert logged == (len(life.image.log), len(life.file.log))
    assert not any(env.timers for env in life.envs)


def test_the_rate_is_kept(tmp_path: Path) -> None:
    """No more bytes per second go below than `destage=` says. Blocks count as dirty until they are flushed below."""
    life = Life(tmp_path, Random(1))
    life.text = life.text.replace("mode=writeback", "mode=writeback,destage=8K")
    life.start()
    for place in range(0, 30 * BLOCK, BLOCK):
        life.disk.do(write(place, b"n" * BLOCK))
    pass_time(life, REST_S)
    first = below(life)
    pass_time(life, 5)

    assert 9 <= below(life) - first <= 11
    assert 0 <= life.figures()["dirty"] - (30 - below(life)) <= 2  # below already, but not flushed yet


def test_many_do_not_rest(tmp_path: Path) -> None:
    """If more than half of the permitted dirty blocks are dirty, the oldest are written below without rest."""
    life = Life(tmp_path, Random(1), size=1 << 20)
    limit = life.writer.destage._limit
    for place in range(0, (limit // 2 + 10) * BLOCK, BLOCK):
        life.disk.do(write(place, b"n" * BLOCK))
    pass_time(life, 1)

    assert 10 <= below(life) < 40
    assert life.image.bytes[:BLOCK] == b"n" * BLOCK


def test_media_that_answer_at_once(tmp_path: Path) -> None:
    """While thousands of blocks go below to a medium that answers at once, as the page cache does, a guest's request
    waits for a few at most.
    """
    machine, size, file = Machine(), 16 << 20, Path(f"/dev/shm/{tmp_path.name}")
    (tmp_path / "image").write_bytes(bytes(size))
    text = f"cache:{file},size=16M,block=4K,mode=writeback|aio:{tmp_path}/image,cache=on"
    chain = machine.open(text)
    try:
        for place in range(0, size, 128 << 10):
            assert [0] == machine.do(chain, write(place, b"n" * (128 << 10)))
        driver = chain.layers[0].driver
        assert driver.figures()["dirty"] > 2000
        assert isinstance(driver, Cache)
        assert isinstance(driver._requests, WriteBack)
        counts = [driver.figures()["destaged"]]
        for _ in range(50):
            driver._requests.destage._tick()
            machine.do(chain, read(0, 512))
            counts.append(driver.figures()["destaged"])
        assert max(later - sooner for sooner, later in pairwise(counts)) <= 4 * 8
        chain.close()
        assert b"n" * size == machine.contents(text)  # a slow host has not had the time for all of them
    finally:
        file.unlink()
        machine.close()


def test_a_flush_below_that_takes_long_stops_what_goes_there(tmp_path: Path) -> None:
    """While a flush below takes long, writing below stops, so that only a limited number of blocks waits for that
    flush, even if the medium takes any number.
    """
    life = Life(tmp_path, Random(1), size=8 << 20)
    life.text = life.text.replace("size=1M", "size=8M")
    life.file.bytes[:] = bytes(BLOCK)
    del life.file.bytes[BLOCK:]
    life.memories.clear()
    held, submit = list[Request](), life.image.submit

    def hold(batch: list[Request]) -> None:
        held.extend(each for each in batch if each.op == Op.FLUSH)
        submit([each for each in batch if each.op != Op.FLUSH])

    life.image.submit = hold
    life.start()
    for place in range(0, 900 * BLOCK, BLOCK):
        life.disk.do(write(place, b"n" * BLOCK))
    pass_time(life, 35)
    assert (1, True) == (len(held), 500 < life.figures()["destaged"] < 700)
    while life.figures()["dirty"]:
        submit(held[:])
        held.clear()
        pass_time(life, 1)

    assert b"n" * (900 * BLOCK) == life.image.bytes[: 900 * BLOCK]


def test_a_discard_waits_for_what_is_moving_alone(tmp_path: Path) -> None:
    """A discard waits only for those of its blocks that are on their way below, not for hundreds that might follow."""
    life = Life(tmp_path, Random(1), size=1 << 20)
    for place in range(0, 100 * BLOCK, BLOCK):
        life.disk.do(write(place, b"n" * BLOCK))
    life.time += 6
    life.rest()
    request = discard(0, 1 << 20)
    life.disk.chain.submit([request])
    while request.status < 0:
        assert life.disk.step()
        life.rest()
    assert life.figures()["destaged"] <= 8
    life.settle()

    assert bytes(1 << 20) == life.image.bytes == life.disk.everything()


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH])
def test_an_error_below_is_tried_again(tmp_path: Path, op: int) -> None:
    """F4: if writing below fails, it is tried again. Guests' writes succeed meanwhile, and all arrive in the end."""
    life = Life(tmp_path, Random(1))
    life.disk.do(write(0, b"n" * BLOCK))
    tries: list[int] = []
    life.image.fails = lambda request: (tries.append(request.op), errno.EIO)[1] if request.op == op else 0
    pass_time(life, 20)
    assert 1 == life.figures()["dirty"]
    assert 5 < len(tries) < 30
    assert [0] == life.disk.do(write(BLOCK, b"m" * BLOCK))
    life.image.fails = lambda request: 0
    life.settle()

    assert b"n" * BLOCK + b"m" * BLOCK == life.image.bytes[: 2 * BLOCK]


@pytest.mark.parametrize("moment", range(12))
def test_a_flush_below_that_fails_loses_nothing_of_file(tmp_path: Path, moment: int) -> None:
    """F1: if a flush below fails at any step, even the guest's own, the blocks are written again from FILE. The kernel
    drops what it could not write, reports that once, and lets later flushes succeed.
    """
    life = Life(tmp_path, Random(moment))
    for number in range(20):
        assert [0] == life.disk.do(write(number * BLOCK, b"n" * BLOCK))
    assert [0] == life.disk.do(flush())
    flushed = bytes(life.image.bytes)

    def fail(request: Request) -> int:
        if request.op != Op.FLUSH:
            return 0
        life.image.bytes[:] = flushed
        life.image.fails = lambda request: 0
        return errno.EIO

    life.time += 6
    life.rest()
    for _ in range(2 + moment):
        if not life.disk.step():
            life.rest()
    life.image.fails = fail
    guests = flush()
    life.disk.chain.submit([guests])
    life.settle()
    life.run()

    assert b"n" * (20 * BLOCK) == life.image.bytes[: 20 * BLOCK]
    assert errno.EIO in (guests.status, *life.disk.do(flush()))


@pytest.mark.parametrize("op", [Op.WRITE, Op.FLUSH])
def test_an_error_below_is_told_while_it_lasts(tmp_path: Path, op: int) -> None:
    """While writing below fails, a fact says so. The guest gets no error, since its writes to FILE succeeded."""
    life = Life(tmp_path, Random(1))
    for place in range(0, 3 * BLOCK, BLOCK):
        life.disk.do(write(place, b"n" * BLOCK))
    life.image.fails = lambda each: errno.ENOSPC if each.op == op and each.offset in (0, BLOCK) else 0
    pass_time(life, 8)
    assert "No space left on device" in life.envs[-1].facts["destage"]
    life.image.fails = lambda each: errno.ENOSPC if each.op == op and each.offset == BLOCK else 0
    pass_time(life, 8)
    assert (op == Op.WRITE) == ("No space left on device" in life.envs[-1].facts["destage"])
    life.image.fails = lambda request: 0
    life.settle()

    assert "works again" == life.envs[-1].facts["destage"]


def test_what_closing_leaves_in_file_is_said(tmp_path: Path) -> None:
    """If closing leaves dirty blocks in FILE, one alarm says so and why: the layer below is not the whole disk."""
    life = Life(tmp_path, Random(1))
    life.disk.do(write(0, b"n" * BLOCK))
    life.disk.chain.close()
    assert [] == [each for env in life.envs for each in env.alarms]
    life.start()
    life.disk.do(write(0, b"m" * BLOCK))
    life.image.fails = lambda request: errno.EIO
    life.disk.chain.close()

    (said,) = (each for env in life.envs for each in env.alarms)
    assert f"{life.path} holds the only copy of 1 block, as the layer below gives errors (Input/output error)" in said


def test_closing_brings_it_below(tmp_path: Path) -> None:
    """Closing writes all dirty blocks below. If that fails, they stay in FILE durably."""
    life = Life(tmp_path, Random(1))
    life.disk.do(write(0, b"n" * BLOCK))
    life.disk.chain.close()
    assert b"n" * BLOCK == life.image.bytes[:BLOCK]
    life.memories.clear()
    life.start()
    assert 0 == life.figures()["dirty"]
    life.disk.do(write(0, b"m" * BLOCK))
    life.image.fails = lambda request: errno.EIO
    life.disk.chain.close()
    life.image.fails = lambda request: 0
    life.memories.clear()
    life.start()

    assert 1 == life.figures()["dirty"]
    assert b"m" * BLOCK == life.disk.everything()[:BLOCK]
