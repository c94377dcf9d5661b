"""Requests to a cache with mode=read or mode=writethrough, in a disk whose workers are killed."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests import lives
from tests.helpers_block import content, discard, read, write
from tests.recorded import RecordedFile, at
from xenbackend.block.drivers.cache import Cache
from xenbackend.block.request import Op, Request
from xenbackend.block.write_through import WriteThrough


class Life(lives.Beside):
    """A cached disk whose workers are killed."""

    def __init__(
        self, home: Path, chance: Random, *, mode: str = "read", block: str = "4K", size: int = 160 << 10
    ) -> None:
        self.path = at(home / "cache")
        self.first = chance.randbytes(size)
        files = {"image": RecordedFile(bytearray(self.first), chance), self.path: RecordedFile(bytearray(4096), chance)}
        super().__init__(f"cache:{self.path},size=1M,block={block},mode={mode}|aio:image", files, chance)

    @property
    def driver(self) -> Cache:
        """Return the layer."""
        assert isinstance(self.top, Cache)
        return self.top

    @property
    def requests(self) -> WriteThrough:
        """Return the object that handles the cache's requests."""
        assert isinstance(self.driver._requests, WriteThrough)
        return self.driver._requests

    def hits(self, request: Request) -> bool:
        """Do a read, and return whether it was a cache hit."""
        before = self.driver.figures()["hits"]
        assert [0] == self.disk.do(request)
        return self.driver.figures()["hits"] > before


def test_what_was_read_is_read_from_the_file(tmp_path: Path) -> None:
    """A block that is read again comes from FILE alone. A large read goes past the cache and changes nothing there."""
    life = Life(tmp_path, Random(1))
    assert not life.hits(read(512, 1024))
    life.image.fails = lambda request: errno.EIO
    request = read(0, 4096)
    assert life.hits(request)
    assert life.first[:4096] == content(request)
    life.image.fails = lambda request: 0
    assert not life.hits(read(0, 512, (160 << 10) - 512))
    assert not life.hits(read(4096, 512))


@pytest.mark.parametrize("mode", ["read", "writethrough"])
def test_what_was_written_is_below_when_it_is_answered(tmp_path: Path, mode: str) -> None:
    """A write is in the layer below when it is answered. With mode=writethrough it is cached too: whole blocks, and
    parts of cached blocks.
    """
    life = Life(tmp_path, Random(1), mode=mode)
    life.disk.do(read(4096, 512))
    for request in (write(0, b"a" * 8192), write(4096 + 512, b"b" * 512)):
        assert [0] == life.disk.do(request)
    assert b"a" * 4608 + b"b" * 512 + b"a" * 3072 == life.image.bytes[:8192]
    found = read(0, 8192)
    assert (mode == "writethrough") == life.hits(found)

    assert life.image.bytes[:8192] == content(found)
    assert [0] == life.disk.do(write(3 * 4096, b"c" * 512))
    assert not life.hits(read(3 * 4096, 512))


@pytest.mark.parametrize("op", ["write", "discard", "large write"])
@pytest.mark.parametrize("mode", ["read", "writethrough"])
def test_a_miss_that_is_overtaken_is_not_kept(tmp_path: Path, op: str, mode: str) -> None:
    """F2: whatever the order of the steps of a read and a write of one block, a later read does not return old data."""
    for seed in range(30):
        life = Life(tmp_path, Random(seed), mode=mode)
        life.image.can_discard, life.image.discard_granularity = True, 512
        life.start()
        new = {
            "write": write(0, b"n" * 4096),
            "discard": discard(0, 4096),
            "large write": write(0, b"n" * (160 << 10)),
        }[op]
        batch = [read(0, 512), new, read(512, 512)]
        life.chance.shuffle(batch)
        for each in batch:
            life.disk.chain.submit([each])
            for _ in range(life.chance.randint(0, 3)):
                life.chance.choice([life.image.step, life.file.step])()
        while life.disk.step():
            pass
        for _ in range(2):
            last = read(0, 4096)
            assert [0] == life.disk.do(last)
            assert (bytes(4096) if op == "discard" else b"n" * 4096) == content(last), seed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["read", "writethrough"])
def test_killed_anywhere(tmp_path: Path, mode: str, seed: int) -> None:
    """D11, F3: over 30 deaths with requests in flight, which are done again, no read is old, and many are hits."""
    chance = Random(seed)
    life = Life(tmp_path, chance, mode=mode, block=chance.choice(["4K", "16K"]))
    model, hits = bytearray(life.first), 0
    for _ in life.die(30, model, ops=[Op.READ, Op.WRITE], longest=80):
        for place in range(0, len(model), 8192):
            request = read(place, 8192)
            assert [0] == life.disk.do(request)
            assert model[place : place + 8192] == content(request)
        hits += life.driver.figures()["hits"]

    assert hits > 100


def test_no_entry_is_lost_by_kills(tmp_path: Path) -> None:
    """F3: after fifty kills every block is still a hit."""
    life = Life(tmp_path, Random(1))
    places = range(0, 128 << 10, 4096)
    for place in places:
        life.disk.do(read(place, 4096))
    for _ in range(50):
        life.kill()

    assert all(life.hits(read(place, 4096)) for place in places)


@pytest.mark.parametrize("mode", ["read", "writethrough"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_the_loss_of_the_file_costs_speed_only(tmp_path: Path, mode: str, code: int) -> None:
    """F4: whatever FILE does, every read is right and no request fails. After a number of errors FILE is not used any
    more, unless it is only full. A successor does not use what was cached before.
    """
    chance = Random(2)
    life = Life(tmp_path, chance, mode=mode)
    model = bytearray(life.first)
    for place in range(0, 64 << 10, 4096):
        life.disk.do(read(place, 4096))
    life.file.fails = lambda request: code if code == errno.EIO or request.op == Op.WRITE else 0
    for _ in range(60):
        place = chance.randrange(0, 31) * 4096
        if chance.random() < 0.4:
            data = chance.randbytes(4096)
            model[place : place + 4096] = data
            assert [0] == life.disk.do(write(place, data))
        found = read(place, 4096)
        assert [0] == life.disk.do(found)
        assert model[place : place + 4096] == content(found)
    facts = life.driver.env.facts["cache"]

    assert (code == errno.EIO) == facts.startswith("off: ")
    assert life.driver.figures()["errors"] >= 16
    life.file.fails = lambda request: 0
    life.start()
    assert model == life.disk.everything()
    for place in range(0, len(model), 4096):
        found = read(place, 4096)
        assert [0] == life.disk.do(found)
        assert model[place : place + 4096] == content(found)


def test_a_slot_that_is_being_read_is_not_given_away(tmp_path: Path) -> None:
    """A slot that is being read is not given to another block, so a slow read returns the right data."""
    life = Life(tmp_path, Random(1), block="128K", size=4 << 20)
    for block in [*range(8), *range(8)]:  # none is less used than the others
        life.disk.do(read(block << 17, 512))
    late = read(0, 512)
    life.disk.chain.submit([late])
    held, life.file.waiting = life.file.waiting, []
    assert [late.length] == [each.length for each in held]
    for block in range(8, 32):
        life.disk.do(read(block << 17, 512))
    life.file.waiting = held
    while life.disk.step():
        pass

    assert (0, life.first[:512]) == (late.status, content(late))


@pytest.mark.parametrize("is_lost", [False, True])
def test_nothing_of_it_is_under_way_once_it_is_closed(tmp_path: Path, *, is_lost: bool) -> None:
    """When the cache is closed, all writes to FILE have ended. A late one would otherwise hit a slot of the next chain.

    The same holds if FILE was given up meanwhile.
    """
    life = Life(tmp_path, Random(1), mode="writethrough")
    life.disk.do(read(0, 4096))
    batch = [read(128 << 10, 512), write(64 << 10, b"n" * 4096), write(512, b"n" * 512)]  # far from one another
    life.disk.chain.submit(list(batch))
    while len(life.disk.back) < len(batch):
        life.image.step()
    assert len(life.file.waiting) == 3
    if is_lost:
        life.requests.leave_alone("a test")
    life.disk.chain.close()

    assert [] == life.file.waiting
    life.start()
    for place in range(0, 160 << 10, 4096):
        request = read(place, 4096)
        assert [0] == life.disk.do(request)
        assert life.image.bytes[place : place + 4096] == content(request)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["read", "writethrough"])
def test_nothing_stays_pinned(tmp_path: Path, mode: str, seed: int) -> None:
    """However requests end, in FILE or below, no slot stays pinned and no copy is kept once all are done."""
    chance = Random(seed)
    life = Life(tmp_path, chance, mode=mode, block="16K", size=4 << 20)
    rate = 0.0
    for file, code in ((life.file, errno.ENOSPC), (life.image, errno.EIO)):  # a file that is full is not given up
        file.fails = lambda _, code=code: code if chance.random() < rate else 0
    for turn in range(150):
        rate = 0.2 * (turn % 3)
        place, length = chance.randrange(0, 6000) * 512, chance.choice([512, 4096, 16384, 200 * 512])
        batch = [write(place, bytes(length)), read(place, length), read(chance.randrange(0, 250) << 14, 512)]
        chance.shuffle(batch)
        life.disk.chain.submit(batch)
        for _ in range(chance.randint(0, 6)):
            life.disk.step()
    while life.disk.step():
        pass
    requests, rate = life.requests, 0.0

    assert requests.map is not None
    assert life.figures()["errors"] > 10
    assert not any(requests.map.pins)
    assert (0, {}, {}) == (requests._copies._used, requests._overtaken._copies, requests._overtaken._altering)
    assert life.image.bytes == life.disk.everything()


def test_an_error_below_is_the_guests(tmp_path: Path) -> None:
    """F4: a read or write that fails below is not cached, and what is cached stays right."""
    life = Life(tmp_path, Random(1), mode="writethrough")
    life.image.fails = lambda request: errno.EIO
    failed = write(0, b"n" * 4096)
    assert [errno.EIO, errno.EIO] == life.disk.do(read(0, 512), failed)
    life.image.fails = lambda request: 0
    found = read(0, 4096)
    assert not life.hits(found)
    assert life.first[:4096] == content(found)


def test_a_guest_that_alters_its_pages_harms_no_other_read(tmp_path: Path) -> None:
    """D7: if the guest alters its page during a write, the cache keeps what went below."""
    life = Life(tmp_path, Random(1), mode="writethrough")
    request = write(0, b"a" * 4096)
    life.disk.chain.submit([request])
    request.iov[0][:4] = b"evil"
    while life.disk.step():
        pass
    found = read(0, 4096)

    assert life.hits(found)
    assert life.image.bytes[:4096] == content(found) == b"a" * 4096


def test_a_discard_of_anything_empties_no_more_than_it_has_to(tmp_path: Path) -> None:
    """A small discard drops its blocks. One of more blocks than would be looked up one by one empties the cache."""
    life = Life(tmp_path, Random(1))
    for place in (0, 4096):
        life.disk.do(read(place, 4096))
    life.requests._alter(discard(0, 512))
    assert -1 == life.requests.map.find(0) < life.requests.map.find(1)
    life.requests._alter(discard(4096 << 12, 4096 << 13))
    assert -1 == life.requests.map.find(1)
    life.requests._down.clear()
