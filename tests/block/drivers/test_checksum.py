"""The driver checksum."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests import lives
from tests.helpers_block import Machine, again, content, discard, flush, read, write
from tests.recorded import Disk, RecordedFile, RecordedFiles, Session, at, lost_power
from xenbackend.block.chain import Chain
from xenbackend.block.drivers.checksum import Checksum
from xenbackend.block.formats.checksum import SUMS
from xenbackend.block.request import Op, Request
from xenbackend.errors import ChainError, DriverError

SIZE = 1 << 20
BLOCK = 4096


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def later() -> Iterator[Machine]:
    """Return a machine that does not have the memories of the first one."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of random bytes."""
    path = tmp_path / "image"
    path.write_bytes(Random(1).randbytes(SIZE))
    return path


def rot(path: Path, place: int) -> None:
    """Alter a bit on the medium without changing the file's time of change."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def driver_of(chain: Chain) -> Checksum:
    """Return the layer."""
    found = chain.layers[0].driver
    assert isinstance(found, Checksum)
    return found


def test_rot_is_an_error_and_never_data(machine: Machine, later: Machine, tmp_path: Path, image: Path) -> None:
    """A block that differs from what was last read or written fails the reads that include it, and no others. Figures
    and a fact report it, also after the disk was opened anew. Writing the whole block repairs it.
    """
    text = f"checksum:{tmp_path}/sums|aio:{image}"
    chain = machine.open(text)
    assert [0] == machine.do(chain, write(3 * BLOCK, b"w" * BLOCK))
    assert image.read_bytes() == machine.everything(chain)
    assert [0] == machine.do(chain, flush())
    chain.close()
    for place in (3 * BLOCK + 7, 100 * BLOCK):
        rot(image, place)
    chain = later.open(text)
    whole, bad, beside = read(0, SIZE), read(3 * BLOCK + 512, 512), read(4 * BLOCK, 512)

    assert [errno.EILSEQ, errno.EILSEQ, 0] == later.do(chain, whole, bad, beside)
    assert b"\xee" * 512 == content(bad)
    assert 2 == driver_of(chain).figures()["rotten"]
    assert "2 blocks of 4096 bytes, at 12288, 409600" == driver_of(chain).env.facts["rot"]
    assert [errno.EILSEQ, 0] == later.do(chain, write(3 * BLOCK, b"x" * 512), write(3 * BLOCK, b"x" * BLOCK))
    assert [0, 0] == later.do(chain, discard(100 * BLOCK, BLOCK), read(3 * BLOCK, BLOCK))
    assert (0, "none any more") == (driver_of(chain).figures()["rotten"], driver_of(chain).env.facts["rot"])
    chain.close()


def test_a_block_in_the_place_of_another_is_found(machine: Machine, tmp_path: Path, image: Path) -> None:
    """If two blocks have changed places, both are found to be wrong, although each of them is intact."""
    text = f"checksum:{tmp_path}/sums|sync:{image}"
    chain = machine.open(text)
    assert [0, 0] == machine.do(chain, write(0, b"a" * BLOCK), write(BLOCK, b"b" * BLOCK))
    with image.open("r+b") as file:
        file.write(b"b" * BLOCK + b"a" * BLOCK)

    assert [errno.EILSEQ] * 2 == machine.do(chain, read(0, BLOCK), read(BLOCK, BLOCK))
    chain.close()


def test_what_others_wrote_meanwhile_is_no_rot(machine: Machine, later: Machine, tmp_path: Path, image: Path) -> None:
    """An image that was changed without this layer, later than the layer's own closing explains, gets new sums."""
    text = f"checksum:{tmp_path}/sums|aio:{image}"
    chain = machine.open(text)
    machine.everything(chain)
    chain.close()
    plain = machine.open(f"aio:{image}")
    assert [0] == machine.do(plain, write(0, b"n" * BLOCK))
    plain.close()
    late = (tmp_path / "sums").stat().st_mtime_ns + 11 * 10**9
    os.utime(image, ns=(late, late))
    chain = later.open(text)

    assert image.read_bytes() == later.everything(chain)
    assert "made again" in driver_of(chain).env.facts["sums"]
    chain.close()


def test_a_guest_that_was_served_without_it_meanwhile_finds_no_rot(
    machine: Machine, later: Machine, tmp_path: Path, image: Path
) -> None:
    """`set` may remove the layer and put it back within a second. What was written in between does not count as rot."""
    text = f"checksum:{tmp_path}/sums|aio:{image}"
    chain = machine.open(text)
    machine.everything(chain)
    chain.close()
    plain = machine.open(f"aio:{image}")
    assert [0] == machine.do(plain, write(0, b"n" * BLOCK))
    plain.close()
    later.make_env.resumes = True
    chain = later.open(text)

    assert image.read_bytes() == later.everything(chain)
    assert "made again" in driver_of(chain).env.facts["sums"]
    chain.close()


@pytest.mark.parametrize("change", ["another image", "size", "shorter", "header", "cow", "empty"])
def test_a_file_that_does_not_fit_is_refused(machine: Machine, tmp_path: Path, image: Path, change: str) -> None:
    """A file that does not fit the disk is refused and left unchanged, with a message that says what to do."""
    sums, text = tmp_path / "sums", f"checksum:{tmp_path}/sums|aio:{image}"
    machine.open(text).close()
    problem = "has the sums of another disk, of 1048576 bytes; name another file, or remove this one"
    match change:
        case "another image":
            (tmp_path / "new").write_bytes(image.read_bytes())
            (tmp_path / "new").rename(image)
        case "size":
            with image.open("ab") as file:
                file.write(bytes(SIZE))
        case "shorter":
            os.truncate(sums, 8192)
            problem = "it has been truncated"
        case "header":
            with sums.open("r+b") as file:
                file.seek(60)
                file.write(b"!")
            problem = "its header is damaged"
        case "cow":
            sums.unlink()
            machine.open(f"cow:{sums}|aio:{image}").close()
            problem = "it is not a file of checksum:"
        case "empty":
            sums.write_bytes(b"")
            machine.open(text).close()
            return
    before = sums.read_bytes()
    with pytest.raises(DriverError, match=problem):
        machine.open(text)

    assert before == sums.read_bytes()


@pytest.mark.parametrize("block", ["2K", "3K", "2M"])
def test_odd_blocks_are_refused(machine: Machine, tmp_path: Path, block: str) -> None:
    """A block must be a power of two from 4 KiB to 1 MiB, and so large that 1 GiB of sums is enough for the disk."""
    with pytest.raises(ChainError, match="it must be 4K, 8K"):
        machine.open(f"checksum:{tmp_path}/sums,block={block}|ram:1M")
    with pytest.raises(DriverError, match="need too many sums; give a larger block="):
        machine.open(f"checksum:{tmp_path}/huge|null:8T", read_only=True)


def test_partial_writes_to_one_block_all_arrive(machine: Machine, tmp_path: Path, image: Path) -> None:
    """Writes of 512 bytes to the same blocks in one batch, with reads between them, all arrive without any rot."""
    chain = machine.open(f"checksum:{tmp_path}/sums,block=8K|delay:read=2ms,write=1ms,jitter=2ms|aio:{image}")
    expected = bytearray(image.read_bytes())
    batch: list[Request] = []
    for number in range(64):
        batch += [write(512 * number, bytes([number]) * 512), read(512 * number, 512)]
        expected[512 * number : 512 * (number + 1)] = bytes([number]) * 512
    batch += [discard(1 << 19, 12288), write((1 << 19) + 8192, b"z" * 512)]
    expected[1 << 19 : (1 << 19) + 12288] = bytes(12288)
    assert [0] * len(batch) == machine.do(chain, *batch)
    found = machine.everything(chain)
    at_discard = slice(1 << 19, (1 << 19) + 12288)

    assert expected[: 1 << 19] == found[: 1 << 19]
    assert found[at_discard] in (expected[at_discard], bytes(8192) + b"z" * 512 + bytes(3584))
    assert 0 == driver_of(chain).figures()["rotten"]
    chain.close()


@pytest.mark.parametrize("is_known", [False, True])
def test_a_read_that_is_overtaken_by_a_write_teaches_nothing(tmp_path: Path, *, is_known: bool) -> None:
    """A read that was overtaken by a write returns the older data, whose sum is not taken for the block's."""
    life = Life(tmp_path, Random(1), "4K")
    assert [0] == life.disk.do(write(BLOCK, bytes(BLOCK)))  # so that the page is in doubt
    if is_known:
        life.disk.everything()
    held: list[Request] = []
    complete = life.image.complete

    def hold_reads(batch: list[Request]) -> None:
        held.extend(each for each in batch if each.op == Op.READ)
        if rest := [each for each in batch if each.op != Op.READ]:
            complete(rest)

    life.image.complete = hold_reads
    late = read(0, BLOCK)
    life.disk.chain.submit([late])
    while not held:
        assert life.disk.step()
    assert [0] == life.disk.do(write(0, b"n" * BLOCK))
    life.image.complete = complete
    complete(held)
    while life.disk.step():
        pass

    assert (0, life.first[:BLOCK]) == (late.status, content(late))
    assert b"n" * BLOCK == life.disk.everything()[:BLOCK]
    assert 0 == life.figures()["rotten"]


def test_a_large_discard_takes_no_long_time(machine: Machine, tmp_path: Path) -> None:
    """A discard of 64 GiB is done without looking at each block."""
    chain = machine.open(f"checksum:{tmp_path}/sums,block=64K|fault:rate=0|null:64G", checked=False)
    driver_of(chain)._can_discard = True  # null: offers no discard
    driver_of(chain).next.submit = lambda batch: driver_of(chain).on_complete(_done(batch))
    began = time.process_time()
    assert [0, 0] == machine.do(chain, discard(512, (1 << 36) - 1024), write(0, bytes(512)))
    assert time.process_time() - began < 1
    chain.close()


def _done(batch: list[Request]) -> list[Request]:
    for each in batch:
        each.status = 0
    return batch


class Life(lives.Life):
    """A disk whose workers are killed and whose host loses power."""

    def __init__(self, home: Path, chance: Random, block: str) -> None:
        self.path = at(home / "sums")
        self.first = chance.randbytes(64 << 10)
        files = {"image": RecordedFile(bytearray(self.first), chance), self.path: RecordedFile(bytearray(4096), chance)}
        super().__init__(f"checksum:{self.path},block={block}|aio:image", files, chance)

    @property
    def image(self) -> RecordedFile:
        """Return what is below."""
        return self.files["image"]

    @property
    def sums(self) -> RecordedFile:
        """Return FILE."""
        return self.files[self.path]


@pytest.mark.parametrize(("place", "length"), [(0, BLOCK), (0, 3 * BLOCK), (1024, 512), (1024, BLOCK)])
def test_a_guest_that_alters_its_pages_makes_no_rot(tmp_path: Path, place: int, length: int) -> None:
    """D7: if the guest alters its pages during a request, sums still match the medium, and so do checks of reads."""
    for seed in range(12):
        life = Life(tmp_path, Random(seed), "4K")
        life.disk.everything()
        complete = life.image.complete
        for request in (write(place, bytes(length)), read(place, length)):

            def alter(request: Request = request, life: Life = life) -> None:
                request.iov[0][life.chance.randrange(length)] = life.chance.randrange(256)

            # also between the medium and the layers that see its data
            life.image.complete = lambda batch, alter=alter, complete=complete: (alter(), complete(batch))
            life.disk.chain.submit([request])
            while not life.disk.back:
                alter()
                assert life.disk.step()
            life.disk.back.clear()
            while life.disk.step():
                pass
            assert 0 == request.status
        life.image.complete = complete

        assert bytes(life.image.bytes) == life.disk.everything()
        assert 0 == life.figures()["rotten"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", ["4K", "16K"])
def test_killed_anywhere(tmp_path: Path, seed: int, block: str) -> None:
    """D11: over 30 deaths with requests in flight, which are done again, nothing is lost and nothing looks like rot."""
    chance = Random(seed)
    life = Life(tmp_path, chance, block)
    model = bytearray(life.first)
    for _ in life.die(30, model, ops=[Op.READ, Op.WRITE], longest=40, rests=0.2):
        assert model == life.disk.everything()
        assert 0 == life.figures()["rotten"]
    assert life.figures()["verified"] > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", ["4K", "16K"])
def test_power_lost_anywhere(tmp_path: Path, seed: int, block: str) -> None:
    """After a power loss, whatever parts of the writes to both media are there, torn and in any order, no sum
    contradicts the data, and flushed data are intact.
    """
    chance = Random(seed)
    life = Life(tmp_path, chance, block)
    moments: list[tuple[int, int]] = []
    guest = Session(life.disk, life.image, life.first, chance)
    step = life.disk.step

    def stepping() -> bool:
        moments.append((len(life.image.log), len(life.sums.log)))
        if chance.random() < 0.1:
            life.rest()
        return step()

    life.disk.step = stepping
    begun = len(life.sums.log)
    start = bytes(life.sums.bytes)
    for _ in range(12):
        guest.run(10, 24)
        for _ in range(chance.randint(0, 3)):  # settling begins, and the guest goes on at any of its steps
            life.rest()
            for _ in range(chance.randint(0, 5)):
                stepping()
    assert any(each.kind == "write" and each.place >= 8192 for each in life.sums.log[begun:]), "no sum was ever settled"
    for _ in range(40):
        moment = chance.choice(moments)
        image, flushed = lost_power(life.first, life.image.log, moment[0], chance)
        sums, _ = lost_power(start, life.sums.log[begun:], moment[1] - begun, chance)
        files = {life.path: RecordedFile(sums), "image": RecordedFile(image)}
        disk = Disk(life.text, RecordedFiles(**files))
        assert [] == guest.faults_of_power_loss(disk.everything(), flushed)
        assert 0 == disk.chain.layers[0].driver.figures()["rotten"]


def test_what_has_rested_is_not_forgotten_by_a_power_failure(tmp_path: Path) -> None:
    """A page is in doubt only while its data may not be durable. Later rot in it is found even after a power loss."""
    life = Life(tmp_path, Random(1), "4K")
    assert [0, 0] == life.disk.do(write(0, b"x" * BLOCK), flush())
    for _ in range(3):
        life.rest()
        while life.disk.step():
            pass
    flushed = max(place for place, each in enumerate(life.sums.log) if each.kind == "flush")
    assert flushed
    damaged = bytearray(life.image.bytes)
    damaged[100] ^= 1
    files = {life.path: RecordedFile(bytearray(life.sums.bytes)), "image": RecordedFile(damaged)}
    disk = Disk(life.text, RecordedFiles(**files))

    assert [errno.EILSEQ, 0] == disk.do(read(0, BLOCK), read(BLOCK, BLOCK))


def test_a_page_is_in_doubt_before_its_first_write(tmp_path: Path) -> None:
    """Before the first write to a page is sent to the medium, the log durably says that the page is in doubt. If that
    fails, the write fails.
    """
    life = Life(tmp_path, Random(1), "4K")
    begun = len(life.sums.log)
    order: list[str] = []
    for name, file in (("image", life.image), ("sums", life.sums)):
        file.fails = _noting(order, name)
    assert [0] == life.disk.do(write(0, bytes(BLOCK)))
    assert ["sums WRITE", "sums FLUSH", "image WRITE"] == order
    assert [("write", 4096), ("flush", 0)] == [(each.kind, each.place) for each in life.sums.log[begun:]]
    life = Life(tmp_path, Random(1), "4K")
    life.sums.fails = lambda request: errno.ENOSPC if request.op == Op.WRITE else 0
    request = write(0, bytes(BLOCK))
    assert [errno.ENOSPC, 0] == life.disk.do(request, read(BLOCK, 512))
    life.sums.fails = lambda request: 0
    assert [0] == life.disk.do(again(request))


def _noting(order: list[str], name: str) -> Callable[[Request], int]:
    def fails(request: Request) -> int:
        order.append(f"{name} {Op(request.op).name}")
        return 0

    return fails


def test_another_file_of_the_same_name_has_its_own_sums(tmp_path: Path) -> None:
    """If another file was put in FILE's place, the sums in memory are not used. A new file knows no sums."""
    life = Life(tmp_path, Random(1), "4K")
    life.disk.everything()
    life.files[life.path] = RecordedFile(bytearray(4096))
    life.image.bytes[0] ^= 1
    life.start()

    assert bytes(life.image.bytes) == life.disk.everything()
    assert 0 == life.figures()["rotten"]
    assert SUMS > life.figures()["learned"] > 0
