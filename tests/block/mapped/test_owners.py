"""Tests of `xenbackend.block.mapped.owners`, and of reads that use it to skip levels of a chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Bottom, Machine, content, read, write
from tests.qcow_images import qcow2
from tests.vhd_images import image
from xenbackend.block.chain import Chain
from xenbackend.block.mapped import owners
from xenbackend.block.mapped.owners import Memo, Owners
from xenbackend.block.request import Request

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


class Spied:
    """A chain that counts the requests that come to each of its levels."""

    def __init__(self, machine: Machine, text: str) -> None:
        self.machine = machine
        self.chain: Chain = machine.open(text, checked=False)
        self.counts = [0] * len(self.chain.layers)
        for level, layer in enumerate(self.chain.layers):
            if level:
                layer.driver.submit = self._counting(level, layer.driver.submit)

    def _counting(self, level: int, submit: Callable[[list[Request]], None]) -> Callable[[list[Request]], None]:
        def counted(batch: list[Request]) -> None:
            self.counts[level] += len(batch)
            submit(batch)

        return counted

    def reads(self, offset: int, length: int) -> tuple[bytes, list[int]]:
        """Return the data, and how many requests each level got for them."""
        self.counts = [0] * len(self.counts)
        request = read(offset, length)
        assert [0] == self.machine.do(self.chain, request)
        return content(request), self.counts[1:]

    def writes(self, offset: int, data: bytes) -> None:
        """Write data."""
        assert [0] == self.machine.do(self.chain, write(offset, data))


@pytest.fixture
def qcow2_chain(machine: Machine, tmp_path: Path) -> Spied:
    """Return a chain of four images with clusters of 4, 64, 4, 4 KiB. The third has clusters 0 and 17, the last all."""
    whole = {number: bytes([number % 251]) * 4096 for number in range(SIZE // 4096)}
    (tmp_path / "d").write_bytes(qcow2(SIZE, whole))
    third = qcow2(SIZE, {0: b"c" * 4096, 17: b"c" * 4096}, backing=b"d", backing_format=b"qcow2")
    (tmp_path / "c").write_bytes(third)
    (tmp_path / "b").write_bytes(qcow2(SIZE, cluster_bits=16, backing=b"c", backing_format=b"qcow2"))
    (tmp_path / "a").write_bytes(qcow2(SIZE, backing=b"b", backing_format=b"qcow2"))
    return Spied(machine, f"qcow2:{tmp_path}/a")


def test_a_warm_read_goes_where_the_data_are(qcow2_chain: Spied) -> None:
    """Once the tables are loaded, a read goes directly to the level that has the data, and the data are right."""
    for place, levels, expected in ((18, [0, 0, 1], b"\x12"), (17, [0, 1, 0], b"c"), (200, [0, 0, 1], b"\xc8")):
        for _ in range(3):
            data, counts = qcow2_chain.reads(place * 4096, 4096)
            assert expected * 4096 == data
        assert levels == counts, place
    qcow2_chain.chain.close()


def test_a_large_warm_read_goes_there_too(qcow2_chain: Spied) -> None:
    """A read of many clusters that one level has goes there uncut. One whose clusters are on several levels is cut."""
    expected = b"".join(bytes([number]) * 4096 for number in range(20, 40))
    for _ in range(4):
        data, counts = qcow2_chain.reads(20 * 4096, 20 * 4096)
        assert expected == data
    assert [0, 0, 1] == counts
    data, _ = qcow2_chain.reads(16 * 4096, 3 * 4096)
    assert b"\x10" * 4096 + b"c" * 4096 + b"\x12" * 4096 == data
    qcow2_chain.chain.close()


def test_what_is_written_is_the_disks_own(qcow2_chain: Spied) -> None:
    """A write after such reads is seen by later ones."""
    for _ in range(3):
        qcow2_chain.reads(18 * 4096, 4096)
    qcow2_chain.writes(18 * 4096 + 512, b"w" * 512)

    data, counts = qcow2_chain.reads(18 * 4096, 4096)
    assert (b"\x12" * 512 + b"w" * 512).ljust(4096, b"\x12") == data
    assert [0, 0, 0] == counts
    qcow2_chain.chain.close()


def test_sectors_that_a_block_lacks(machine: Machine, tmp_path: Path) -> None:
    """Reads from a VHD block that lacks their sectors skip levels too, page by page, and see later writes."""
    names = [(b"MacX", b"file://./%s")]
    full = {block: {sector: bytes([sector % 251]) * 512 for sector in range(4096)} for block in range(2)}
    (tmp_path / "d").write_bytes(image(SIZE, full, uuid=b"d" * 16))
    for name, below, sector in (("c", "d", 64), ("b", "c", 72), ("a", "b", 80)):
        names = [(b"MacX", f"file://./{below}".encode())]
        blocks = {0: {sector: name.encode() * 512}}
        data = image(SIZE, blocks, uuid=name.encode() * 16, parent_uuid=below.encode() * 16, names=names)
        (tmp_path / name).write_bytes(data)
    spied = Spied(machine, f"vhd:{tmp_path}/a")
    mine = [b"a" * 512, b"b" * 512, b"c" * 512]
    for sector, levels in ((8, [0, 0, 1]), (80, [0, 0, 0]), (72, [1, 0, 0]), (64, [0, 1, 0])):
        for _ in range(5):
            data, counts = spied.reads(sector * 512, 512)
        assert levels == counts, sector
        expected = {80: mine[0], 72: mine[1], 64: mine[2]}.get(sector, bytes([sector]) * 512)
        assert expected == data
    spied.writes(8 * 512, b"w" * 512)

    assert (b"w" * 512, [0, 0, 0]) == spied.reads(8 * 512, 512)
    assert bytes([9]) * 512 == spied.reads(9 * 512, 512)[0]
    spied.chain.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_chains(machine: Machine, tmp_path: Path, seed: int) -> None:
    """Whatever the levels hold and whatever is written between reads, a chain of five reads as the model."""
    chance, model = Random(seed), bytearray(SIZE // 4)
    for level in range(5):
        bits = chance.choice([9, 12, 13])
        size, numbers = 1 << bits, range(len(model) >> bits)
        clusters = {number: chance.randbytes(size) for number in chance.sample(numbers, len(numbers) // 4)}
        for number, data in clusters.items():
            model[number * size : (number + 1) * size] = data
        backing = {"backing": str(level - 1).encode(), "backing_format": b"qcow2"} if level else {}
        (tmp_path / str(level)).write_bytes(
            qcow2(len(model), clusters, cluster_bits=bits, table_clusters=16, **backing)
        )
    spied = Spied(machine, f"qcow2:{tmp_path}/4")
    for _ in range(400):
        length = chance.choice([512, 4096, 4096, 32 * KIB])
        offset = chance.randrange(0, len(model) - length) // 512 * 512
        if chance.random() < 0.1:
            data = chance.randbytes(length)
            spied.writes(offset, data)
            model[offset : offset + length] = data
        else:
            assert model[offset : offset + length] == spied.reads(offset, length)[0]
    spied.chain.close()


def test_owners_have_numbers() -> None:
    """An owner keeps its number, and gathered requests are taken once. The 256th owner gets no number."""
    all_of_them, drivers = Owners(), [Bottom() for _ in range(256)]
    assert [*range(1, 256), 0] == [all_of_them.number(driver) for driver in drivers]
    assert 3 == all_of_them.number(drivers[2])
    first, second = read(0, 512), read(512, 512)
    all_of_them.gathered[3].append(first)
    all_of_them.gathered[0].append(second)

    assert [(None, [second]), (drivers[2], [first])] == all_of_them.take()
    assert [] == all_of_them.take()


def test_a_memo_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tables are remembered, the memory is bounded. What was dropped counts as unknown."""
    monkeypatch.setattr(owners, "_MOST", 3 * (100 + 128))
    memo = Memo(100)
    for table in range(20):
        memo.remember(table, 7, 5)
        assert 5 == memo.known[table][7]
        assert len(memo.known) <= 3
