"""Which requests of a disk of `cow:` go where; drivers/test_cow.py has what the disk holds."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.helpers_block import Machine, content, discard, flush, read, write
from tests.recorded import Disk, RecordedFile, RecordedFiles, at
from xenbackend.block.chain import Chain
from xenbackend.block.formats.cow import OWN, ZEROS
from xenbackend.block.request import Op

BLOCK = 4096


def states(chain: Chain) -> bytes:
    """Return the map of a chain whose top is cow."""
    return bytes(chain.layers[0].driver._requests._states)


def test_a_whole_block_is_not_read_first(machine: Machine, tmp_path: Path) -> None:
    """A write of a whole block reads nothing from below, and a discard of whole blocks writes nothing."""
    chain = machine.open(f"cow:{tmp_path}/cow,block=4K|fault:op=read|ram:1M")
    assert [0, 0, 5] == machine.do(chain, write(4096, bytes(4096)), discard(8192, 8192), write(0, bytes(512)))
    assert bytes([0, OWN, ZEROS, ZEROS, 0]) == states(chain)[:5]
    chain.close()


def test_what_is_in_one_place_is_sent_as_it_is(tmp_path: Path) -> None:
    """A read of what only the layer below has reaches that layer as the guest's own request, beside a read of the
    driver's own for a first write; what FILE has is read and written there without it.
    """
    first, path = Random(6).randbytes(64 << 10), at(tmp_path / "cow")
    files = {path: RecordedFile(bytearray(4096)), "base": RecordedFile(bytearray(first))}
    disk = Disk(f"cow:{path},block=4K|aio:base", RecordedFiles(**files))
    requests = [read(0, 16384), write(20480, b"x" * 512), read(32768, 512)]
    disk.chain.submit(list(requests))
    below = list(files["base"].waiting)

    assert [requests[0], requests[2]] == [each for each in below if each in requests]
    assert [(Op.READ, 20480, 4096)] == [(each.op, each.offset, each.length) for each in below if each not in requests]
    while disk.step():
        pass
    assert [0, 0, 0] == [each.status for each in requests]
    assert first[:16384] == content(requests[0])
    own = [read(20480, 4096), write(20480 + 512, b"y" * 512)]
    assert [0, 0] == disk.do(*own)
    assert not files["base"].waiting
    assert first[:20480] + b"x" * 512 + b"y" * 512 + first[21504:] == disk.everything()


def test_a_part_of_a_cow_above_is_a_request_like_others(tmp_path: Path) -> None:
    """The lower of two layers, which reads block by block itself, gives a read of the upper one's own back to it."""
    first, upper, lower = Random(7).randbytes(64 << 10), at(tmp_path / "upper"), at(tmp_path / "lower")
    files = {lower: RecordedFile(bytearray(4096)), "base": RecordedFile(bytearray(first))}
    below = Disk(f"cow:{lower},block=4K|aio:base", RecordedFiles(**files))
    assert [0] == below.do(write(4096, b"x" * 4096))
    below.chain.close()
    expected = bytearray(first)
    expected[4096:8192] = b"x" * 4096
    files[upper] = RecordedFile(bytearray(4096))
    disk = Disk(f"cow:{upper},block=4K|cow:{lower},block=4K|aio:base", RecordedFiles(**files))
    requests = [read(0, 12288), write(20480, b"y" * 512)]
    assert [0, 0] == disk.do(*requests)

    assert expected[:12288] == content(requests[0])
    expected[20480:20992] = b"y" * 512
    assert expected == disk.everything()
    assert [0, 0] == [layer.driver._requests._parts_below for layer in disk.chain.layers[:2]]


def test_a_discard_goes_by_runs(tmp_path: Path) -> None:
    """A discard is one request to FILE for each run of its blocks that no write interrupts, however long.

    A block that is just being written is waited for, so that the discard comes after its first write.
    """
    first, path, file = Random(6).randbytes(1 << 20), at(tmp_path / "cow"), RecordedFile(bytearray(4096))
    file.can_discard, file.discard_granularity = True, 4096
    files = RecordedFiles(**{path: file, "base": RecordedFile(bytearray(first))})
    disk = Disk(f"cow:{path},block=4K|aio:base", files)
    assert [0, 0, 0] == disk.do(write(5 * BLOCK, bytes(2 * BLOCK)), write(20 * BLOCK, b"x" * 512), flush())
    model, late = bytearray(first), write(100 * BLOCK, b"late" * 128)
    disk.chain.submit([late])
    disk.chain.submit([discard(512, (1 << 20) - 1024)])
    assert [(Op.DISCARD, 16 * BLOCK)] == [(each.op, each.length) for each in file.waiting]
    assert 200 > sum(len(each.waiting) for each in files.files.values())
    while disk.step():
        pass
    model[512:-512] = bytes((1 << 20) - 1024)

    assert [0, 0] == [each.status for each in disk.back]
    assert {"own": 6, "zeros": 251 - 1} == disk.chain.layers[0].driver.figures()
    disk.back.clear()
    assert model == disk.everything()
