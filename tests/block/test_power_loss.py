"""Plain chains whose worker is killed or whose host loses power: whatever else happens, flushed data are there."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests import figures
from tests.helpers_block import content, flush, read, write
from tests.recorded import Change, Disk, RecordedFile, RecordedFiles, Session, after_power_loss, at, state, tears
from xenbackend.block.formats.blank import Wishes, blank
from xenbackend.block.formats.qcow2_check import Check
from xenbackend.block.formats.qcow2_repair import plan_repair
from xenbackend.errors import DriverError

SIZE = 64 << 10
CHAINS = ("aio:{path}", "sync:{path}", "log:|aio:{path}", "delay:|log:granularity=4K|aio:{path}")


def session(chain: str, path: str, chance: Random) -> Session:
    """Run a guest's random requests against a disk of random bytes until all are done, and return the session."""
    first = chance.randbytes(SIZE)
    file = RecordedFile(bytearray(first), chance)
    disk = Disk(chain.format(path=path), RecordedFiles(**{path: file}))
    found = Session(disk, file, first, chance)
    found.run(80, 24)
    return found


def again(chain: str, path: str, data: bytearray) -> bytes:
    """Return what a successor reads if the file was left with these bytes."""
    disk = Disk(chain.format(path=path), RecordedFiles(**{path: RecordedFile(data)}))
    return disk.everything()


@pytest.mark.parametrize("chain", CHAINS)
def test_power_lost_anywhere(tmp_path: Path, request: pytest.FixtureRequest, chain: str) -> None:
    """After a power loss, flushed data are intact. Of unflushed writes any part may be there, torn or not."""
    chance = Random(request.config.getoption("--seed"))
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    for _ in range(60):
        data, flushed = after_power_loss(guest.first, guest.file.log, chance)
        assert [] == guest.faults_of_power_loss(again(chain, path, data), flushed)
    figures.add("crash points", 60)


@pytest.mark.parametrize("chain", CHAINS)
def test_power_lost_at_each_flush(tmp_path: Path, chain: str) -> None:
    """If the power fails right after a flush, everything that the flush promised is there."""
    chance = Random(1)
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    flushes = [place for place, change in enumerate(guest.file.log) if change.kind == "flush"]
    assert flushes
    for place in flushes:
        data = state(guest.first, guest.file.log, place + 1)
        assert [] == guest.faults_of_power_loss(again(chain, path, data), place)
    figures.add("crash points", len(flushes))


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_anywhere(tmp_path: Path, chain: str) -> None:
    """Wherever a worker is killed, answered writes are there, and of the others any part may be."""
    chance = Random(2)
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    for count, torn in chance.sample([*tears(guest.file.log)], 60):
        data = state(guest.first, guest.file.log, count, torn)
        assert [] == guest.faults_of_a_kill(again(chain, path, data), count)
    figures.add("crash points", 60)


def test_a_flush_that_is_not_passed_on_is_found(tmp_path: Path) -> None:
    """The check that these tests rely on finds a chain guilty if it answers flushes without doing them."""
    chance = Random(3)
    path = at(tmp_path / "image")
    guest = session("aio:{path}", path, chance)
    guest.file.log[:] = [each if each.kind != "flush" else Change("write") for each in guest.file.log]
    lost = state(guest.first, guest.file.log, 0)

    assert guest.faults_of_power_loss(again("aio:{path}", path, lost), len(guest.file.log))


@pytest.mark.parametrize(
    ("layer", "wishes"), [("qcow2", Wishes(4096)), ("qcow2", Wishes()), ("vhd", Wishes(64 << 10)), ("qcow", Wishes())]
)
def test_a_draft_is_whole_up_to_its_last_flush(tmp_path: Path, layer: str, wishes: Wishes) -> None:
    """An image that is being made does not order its writes between flushes. After a power failure it either holds what
    it held at the last flush and can be written on, once it has been repaired, or it is found to be damaged.
    """
    size, piece, chance = 2 << 20, 64 << 10, Random(4)
    new, path, data = blank(layer, size, wishes, None), at(tmp_path / "image"), Random(5).randbytes(2 << 20)
    first = bytearray(new.size)
    for place, each in new.pieces:
        first[place : place + len(each)] = each
    file = RecordedFile(bytearray(first), chance)
    disk = Disk(f"{layer}:{path}", RecordedFiles(**{path: file}), is_draft=True)
    begun = len(file.log)
    for start in range(0, size // 2, piece):
        assert [0] == disk.do(write(start, data[start : start + piece]))
    assert not any(change.kind == "flush" for change in file.log[begun:])
    assert [0] == disk.do(flush())
    durable = len(file.log)
    for start in range(size // 2, size, piece):
        assert [0] == disk.do(write(start, data[start : start + piece]))
    went_on = 0
    for _ in range(60):
        left, flushed = after_power_loss(bytes(first), file.log, chance)
        if flushed < durable - 1:
            continue
        again = RecordedFile(left)
        try:
            if layer == "qcow2":
                mend(again)
            disk = Disk(f"{layer}:{path}", RecordedFiles(**{path: again}))
        except DriverError:
            continue
        request = read(0, size // 2)
        assert [0] == disk.do(request)
        assert data[: size // 2] == content(request)
        for start in range(size // 2, size, piece):
            assert [0] == disk.do(write(start, data[start : start + piece]))
        assert data == disk.everything()
        went_on += 1
    assert went_on > 5


def mend(file: RecordedFile) -> None:
    """Repair an image as `image check --repair` does. Raises: DriverError."""
    check = Check(file.read_at, file.size)
    check.run()
    for writes in plan_repair(check):
        for place, data in writes:
            file.grow(place + len(data))
            file.write_at(place, data)
    check = Check(file.read_at, file.size)
    check.run()
    if check.report.errors:
        raise DriverError("it cannot be mended")
