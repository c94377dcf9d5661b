"""A cache that answers writes before the layer below has them: with kills, power loss, and any order of steps."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests import lives
from tests.helpers_block import Machine, content, discard, flush, read, write
from tests.recorded import SECTOR, Disk, RecordedFile, RecordedFiles, Session, at, lost_power
from xenbackend.block import copies, overtaken
from xenbackend.block.cache_parts import MOST
from xenbackend.block.drivers.cache import Cache
from xenbackend.block.request import Op, Request
from xenbackend.block.write_back import WriteBack

OPS = [Op.READ, Op.WRITE, Op.WRITE, Op.DISCARD]
# Of a disk that has room in the cache, of one with some hundred blocks for 64 slots, and of one with 24 for 8
SHAPES = [("4K", 160 << 10), ("16K", 2 << 20), ("128K", (3 << 20) + 512)]


class AtOnce(Random):
    """Has a `RecordedFile` do at once what it may do late."""

    def random(self) -> float:
        """Return the same each time."""
        return 0.9


class Life(lives.Beside):
    """A disk with a write-back cache. Time stands still except in `rest`, after which all dirty blocks have rested."""

    def __init__(self, home: Path, chance: Random, *, block: str = "4K", size: int = 160 << 10) -> None:
        self.path = at(home / "cache")
        self.first = chance.randbytes(size)
        image = RecordedFile(bytearray(self.first), chance, can_discard=True, discard_granularity=512)
        files = {"image": image, self.path: RecordedFile(bytearray(4096), chance)}
        self.time = 0.0
        super().__init__(f"cache:{self.path},size=1M,block={block},mode=writeback|aio:image", files, chance)

    def start(self) -> None:
        """See `lives.Life`."""
        super().start()
        for env in self.envs:
            env.now = lambda: self.time

    def kill(self) -> None:
        """See `lives.Life`. From then on FILE gives no errors."""
        self.file.fails = lambda request: 0
        super().kill()

    def fails_at_times(self, part: float) -> None:
        """Let a part of the writes to slots fail. Some of their data may be in FILE all the same."""

        def fails(request: Request) -> int:
            if request.op != Op.WRITE or request.offset < self.writer._data_at or self.chance.random() >= part:
                return 0
            landed = self.chance.randint(0, request.length // SECTOR) * SECTOR
            self.file.write_at(request.offset, content(request)[:landed])
            return errno.EIO

        self.file.fails = fails

    def rest(self) -> None:
        """Let time pass."""
        self.time += 6
        super().rest()

    @property
    def writer(self) -> WriteBack:
        """Return the object that handles the cache's requests."""
        assert isinstance(self.top, Cache)
        assert isinstance(self.top._requests, WriteBack)
        return self.top._requests

    def run(self) -> None:
        """Do all steps that are due."""
        while self.disk.step():
            pass

    def settle(self) -> None:
        """Let all dirty blocks reach the layer below."""
        for _ in range(200):
            self.run()
            if not self.figures()["dirty"] and not self.writer.destage._freed:
                return
            self.rest()
        raise AssertionError(self.figures())


def test_a_write_is_answered_before_it_is_below(tmp_path: Path) -> None:
    """A write is answered before the layer below has it, and goes there once it has rested. Reads are always right."""
    life = Life(tmp_path, Random(1), block="16K")
    assert [0] == life.disk.do(write(512, b"n" * 4096))
    model = life.first[:512] + b"n" * 4096 + life.first[4608:]
    assert life.first == life.image.bytes
    assert 1 == life.figures()["dirty"]
    assert model == life.disk.everything()
    life.settle()

    assert model == life.image.bytes == life.disk.everything()
    assert (0, 1) == (life.figures()["dirty"], life.figures()["destaged"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_killed_anywhere(tmp_path: Path, seed: int, block: str, size: int) -> None:
    """D11: over 40 deaths with requests and destaging in flight, which are done again, nothing is lost."""
    chance = Random(seed)
    life = Life(tmp_path, chance, block=block, size=size)
    model, destaged = bytearray(life.first), 0
    for _ in life.die(40, model, ops=OPS, longest=chance.choice([40, 300]), rests=0.3):
        assert model == life.disk.everything()
        destaged += life.figures()["destaged"]
    life.settle()

    assert model == life.disk.everything() == life.image.bytes
    assert not any(life.writer.map.pins)


@pytest.mark.parametrize("errors", [0, 0.3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "size"), SHAPES)
def test_power_lost_anywhere(tmp_path: Path, seed: int, block: str, size: int, errors: float) -> None:
    """F1: after a power loss, any part of what the two media were given since their last flush is there, torn and in
    any order. What the guest had flushed is intact, and so are the neighbours of unflushed writes, even if writes to
    FILE fail, torn.
    """
    chance = Random(seed)
    life = Life(tmp_path, chance, block=block, size=size)
    life.fails_at_times(errors)
    start, moments = bytes(life.file.bytes), list[tuple[int, int, int]]()
    begun = len(life.file.log)
    guest = Session(life.disk, life.image, life.first, chance)
    clock = RecordedLog(life.image, life.file)
    guest.file = clock
    step = life.disk.step

    def stepping() -> bool:
        moments.append((len(clock.log), len(life.image.log), len(life.file.log) - begun))
        if chance.random() < 0.15:
            life.rest()
        return step()

    life.disk.step = stepping
    for longest in (24, 300, 24):
        guest.run(50, longest)
        for _ in range(10):
            life.rest()
            stepping()
    assert life.figures()["destaged"] > 3
    for _ in range(40):
        moment = chance.choice(moments)
        image, _ = lost_power(life.first, life.image.log, moment[1], chance)
        file, _ = lost_power(start, life.file.log[begun:], moment[2], chance)
        files = {life.path: RecordedFile(file), "image": RecordedFile(image)}
        disk = Disk(life.text, RecordedFiles(**files))
        assert [] == guest.faults_of_power_loss(disk.everything(), moment[0] - 1), moment


class RecordedLog:
    """The changes of several files together, of which only the number counts."""

    def __init__(self, *files: RecordedFile) -> None:
        self.files = files

    @property
    def log(self) -> range:
        """Return a range as long as the logs of all files together."""
        return range(sum(len(each.log) for each in self.files))


def without_power(life: Life, chance: Random, before: int = 0) -> Disk:
    """Return the disk as it is after a power loss now, or `before` changes of FILE ago."""
    image, _ = lost_power(life.first, life.image.log, len(life.image.log), chance)
    file, _ = lost_power(bytes(4096), life.file.log, len(life.file.log) - before, chance)
    return Disk(life.text, RecordedFiles(**{life.path: RecordedFile(file), "image": RecordedFile(image)}))


def test_a_flush_covers_what_a_killed_worker_left(tmp_path: Path) -> None:
    """D11: a successor does not know what its predecessor wrote below, so its first flush includes the layer below."""
    for seed in range(10):
        life = Life(tmp_path, Random(seed))
        assert [0, 0] == life.disk.do(write(0, b"a" * (140 << 10)), write(150 << 10, b"b" * 512))
        life.kill()
        assert [0] == life.disk.do(flush())
        found = without_power(life, life.chance).everything()
        assert b"a" * (140 << 10) == found[: 140 << 10]
        assert b"b" * 512 == found[150 << 10 :][:512]


@pytest.mark.parametrize("place", [0, 512])
def test_a_discard_is_never_undone(tmp_path: Path, place: int) -> None:
    """A discard is never undone, even if its block is on its way below: the block reads as zeros, also in a successor
    and, once flushed, after a power loss. A discard that a power loss cut short leaves what was flushed before, or
    zeros.
    """
    old = b"o" * 4096
    for seed in range(80):
        life = Life(tmp_path, Random(seed))
        assert [0, 0] == [*life.disk.do(write(0, old)), *life.disk.do(flush())]
        life.rest()
        for _ in range(life.chance.randint(0, 6)):
            life.disk.step()
        life.disk.back.clear()
        request = discard(place, 4096)
        for each in (request, flush()):
            life.disk.chain.submit([each])
            for _ in range(life.chance.randint(0, 12)):  # either of the two media may be slower by any amount
                life.chance.choice([life.disk.step, life.file.step, life.file.step])()
        cut = without_power(life, life.chance).everything()[place : place + 4096]
        parts = {cut[at : at + 512] for at in range(0, 4096 - place, 512)}
        assert parts <= {bytes(512), b"o" * 512}, seed
        life.settle()
        assert 0 == request.status
        expected = old[:place] + bytes(4096) + life.first[place + 4096 :]
        assert expected == life.disk.everything(), seed
        assert [0] == life.disk.do(flush())
        assert expected == without_power(life, life.chance).everything(), seed
        life.kill()
        assert expected == life.disk.everything(), seed


def test_a_wide_discard_leaves_only_what_is_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discard of more blocks than are looked at one by one empties the cache, except of dirty blocks: what was
    discarded reads as zeros although the cache had it, and what is dirty beside it is still found.
    """
    monkeypatch.setattr(overtaken, "_WIDE", 8)
    life = Life(tmp_path, Random(1))
    end = 80 << 10
    for _ in range(2):
        assert [0] == life.disk.do(read(0, end))
    assert [0] == life.disk.do(write(end, b"d" * 4096))
    assert [0] == life.disk.do(discard(0, end))

    assert bytes(end) + b"d" * 4096 + life.first[end + 4096 :] == life.disk.everything()


def test_file_forgets_nothing_that_the_medium_below_may_not_have(tmp_path: Path) -> None:
    """A discard is durable below before the block's tag is removed from FILE. Otherwise neither might have it."""
    life = Life(tmp_path, Random(1))
    for request in (write(0, b"o" * 4096), flush(), discard(0, 4096)):
        assert [0] == life.disk.do(request)
    life.disk.chain.submit([flush()])
    while life.file.step():
        pass
    for seed in range(20):
        assert without_power(life, Random(seed)).everything()[:512] in (bytes(512), b"o" * 512)


def test_a_slot_is_not_given_away_before_file_knows(tmp_path: Path) -> None:
    """A slot is not reused before the removal of its tag is durable. Until then a power loss may bring the tag back, so
    the slot must still hold its block.
    """
    life = Life(tmp_path, Random(1), block="128K", size=4 << 20)
    for block in range(6):
        life.disk.do(write(block << 17, bytes([block]) * 512))
    life.disk.do(flush())
    fails, life.file.fails = life.file.fails, lambda request: errno.EIO if request.op == Op.FLUSH else 0
    for _ in range(20):
        life.rest()
        life.run()
    assert 6 == life.figures()["destaged"]
    for block in range(8, 30):
        life.disk.do(write(block << 17, b"x" * 512))
    life.file.fails = fails
    found = without_power(life, Random(2)).everything()

    for block in range(6):
        place = block << 17
        assert bytes([block]) * 512 + life.first[place + 512 : place + (1 << 17)] == found[place : place + (1 << 17)]


def test_a_successor_gives_no_slot_away_either(tmp_path: Path) -> None:
    """A successor does not reuse such a slot, either. Wherever its predecessor was killed, FILE still has the tag, or
    the layer below has the block durably.
    """
    for seed in range(12):
        life = Life(tmp_path, Random(seed), block="128K", size=4 << 20)
        life.disk.do(write(0, b"n" * 512))
        life.disk.do(flush())
        life.rest()
        while life.figures()["dirty"]:
            if not life.disk.step():
                life.rest()
        life.kill()
        for block in range(1, 30):
            life.disk.do(read(block << 17, 512))
        for _ in range(4):
            found = without_power(life, life.chance).everything()
            assert b"n" * 512 + life.first[512 : 1 << 17] == found[: 1 << 17], seed


def test_two_blocks_of_one_write_have_two_slots(tmp_path: Path) -> None:
    """Two blocks of one write get two slots, even if the second block's slot is the next to be given away."""
    for victim in range(2, 18, 2):
        life = Life(tmp_path, Random(1), block="128K", size=4 << 20)
        for block in [*range(2, 18, 2)] * 2:  # none is less used than the others
            life.disk.do(read(block << 17, 512))
        place = (victim << 17) - 512
        assert [0] == life.disk.do(write(place, b"n" * 1024))
        expected = life.first[:place] + b"n" * 1024 + life.first[place + 1024 :]
        assert expected == life.disk.everything()
        life.settle()
        assert expected == life.image.bytes


def test_reads_that_file_has_are_hits(tmp_path: Path) -> None:
    """A read from FILE counts as a hit, whether it is done at once or late, and shows that FILE is well: errors of
    writes before it do not count as errors in a row.
    """
    life = Life(tmp_path, Random(1))
    assert [0] == life.disk.do(read(0, 4096))
    for _ in range(20):
        assert [0] == life.disk.do(read(512, 512))
    figures = life.writer.figures()
    life.file.chance = AtOnce()
    life.file.fails = lambda request: errno.EIO if request.op == Op.WRITE else 0
    for number in range(20):
        assert [0, 0] == [*life.disk.do(write(4096 * (1 + number), b"w" * 512)), *life.disk.do(read(512, 512))]

    assert (20, 1) == (figures["hits"], figures["misses"])
    assert not life.writer.is_shunned


def test_a_write_gives_its_copy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory in which the rest of a block was read is free once the block is written, or could not be: with room
    for one copy, no write of a part of a block goes past a FILE that is well.
    """
    life = Life(tmp_path, Random(1))
    monkeypatch.setattr(copies, "_MAX_USED", MOST + 4096)
    for number in range(30):
        fails = errno.EIO * (number % 3 == 0)
        life.file.fails = lambda request, fails=fails: fails if request.op == Op.WRITE else 0
        assert [0] == life.disk.do(write(4096 * number, b"w" * 512))

    assert 10 == life.writer.figures()["around"]


def test_a_disk_that_has_grown(tmp_path: Path) -> None:
    """If a disk has grown, the block in which it used to end is read from the layer below, which has more of it."""
    life = Life(tmp_path, Random(1), block="64K", size=160 << 10)
    assert [0, 0] == life.disk.do(write(0, b"a" * 512), write(150 << 10, b"b" * 512))
    life.image.bytes += b"n" * (32 << 10)
    life.start()

    assert b"a" * 512 + life.first[512 : 150 << 10] + b"b" * 512 == life.disk.everything()[: (150 << 10) + 512]
    assert b"n" * (32 << 10) == life.disk.everything()[160 << 10 :]


def test_a_large_request_goes_past_the_file(tmp_path: Path) -> None:
    """A request of more than MOST bytes gets no slots: a backup leaves what is in use. One of MOST bytes gets them."""
    life = Life(tmp_path, Random(1), size=512 << 10)
    for length, kept in ((MOST + SECTOR, 0), (MOST, MOST >> 12)):
        assert [0] == life.disk.do(read(256 << 10, length))
        hits = life.figures()["hits"]
        assert [0] == life.disk.do(read(256 << 10, SECTOR))
        assert (kept > 0) == (life.figures()["hits"] > hits)
        assert [0] == life.disk.do(write(0, bytes(length)))
        assert kept == life.figures()["dirty"]


def test_a_miss_that_is_overtaken_is_not_kept(tmp_path: Path) -> None:
    """F2: if a read is overtaken by a write so large that it goes past FILE, no later read returns old data."""
    for seed in range(40):
        life = Life(tmp_path, Random(seed))
        batch = [read(0, 512), write(0, b"n" * (150 << 10)), read(512, 512)]
        life.chance.shuffle(batch)
        for each in batch:
            life.disk.chain.submit([each])
            for _ in range(life.chance.randint(0, 3)):
                life.chance.choice([life.image.step, life.file.step])()
        life.run()
        for _ in range(2):
            assert b"n" * (150 << 10) == life.disk.everything()[: 150 << 10], seed
            last = read(0, 4096)
            assert [0] == life.disk.do(last)
            assert b"n" * 4096 == content(last), seed


@pytest.mark.parametrize("seed", range(2))
def test_on_real_files(tmp_path: Path, seed: int) -> None:
    """On real files, any requests in a worker's loop give the right data, and closing brings all data below."""
    chance, model, machine = Random(seed), bytearray(4 << 20), Machine()
    (tmp_path / "image").write_bytes(model)
    text = f"cache:{tmp_path}/cache,size=1M,mode=writeback|aio:{tmp_path}/image"
    for _ in range(3):
        chain = machine.open(text)
        for _ in range(120):
            length = chance.choice([512, 4096, 512 * chance.randint(1, 400)])
            place = chance.randrange(0, (len(model) - length) // 512) * 512
            data = chance.randbytes(length)
            request = chance.choice([read(place, length), write(place, data), discard(place, length), flush()])
            if request.op in (Op.WRITE, Op.DISCARD):
                model[place : place + length] = data if request.op == Op.WRITE else bytes(length)
            assert [0] == machine.do(chain, request)
            assert request.op != Op.READ or model[place : place + length] == content(request)
        chain.close()
        assert model == (tmp_path / "image").read_bytes()
    machine.close()
