"""Plain chains whose worker is killed, or whose host loses its power: what was flushed is there, whatever else is."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.recorded import Change, Disk, RecordedFile, RecordedFiles, Session, after_power_loss, at, state, tears

SIZE = 64 << 10
CHAINS = ("aio:{path}", "sync:{path}", "log:|aio:{path}", "delay:|log:granularity=4K|aio:{path}")


def session(chain: str, path: str, chance: Random) -> Session:
    """Return a guest's requests to a disk that held random bytes before, all of them done."""
    first = chance.randbytes(SIZE)
    file = RecordedFile(bytearray(first), chance)
    disk = Disk(chain.format(path=path), RecordedFiles(**{path: file}))
    found = Session(disk, file, first, chance)
    found.run(80, 24)
    return found


def again(chain: str, path: str, data: bytearray) -> bytes:
    """Return what a successor reads from a file that was left so."""
    disk = Disk(chain.format(path=path), RecordedFiles(**{path: RecordedFile(data)}))
    return disk.everything()


@pytest.mark.parametrize("chain", CHAINS)
def test_power_lost_anywhere(tmp_path: Path, request: pytest.FixtureRequest, chain: str) -> None:
    """Of what was not flushed any part may be there, torn or not; what was flushed before is as it was."""
    chance = Random(request.config.getoption("--seed"))
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    for _ in range(60):
        data, flushed = after_power_loss(guest.first, guest.file.log, chance)
        assert [] == guest.faults_of_power_loss(again(chain, path, data), flushed)


@pytest.mark.parametrize("chain", CHAINS)
def test_power_lost_at_each_flush(tmp_path: Path, chain: str) -> None:
    """Right after each flush all that it promised is there, with nothing of what came later."""
    chance = Random(1)
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    flushes = [place for place, change in enumerate(guest.file.log) if change.kind == "flush"]
    assert flushes
    for place in flushes:
        data = state(guest.first, guest.file.log, place + 1)
        assert [] == guest.faults_of_power_loss(again(chain, path, data), place)


@pytest.mark.parametrize("chain", CHAINS)
def test_killed_anywhere(tmp_path: Path, chain: str) -> None:
    """Wherever a worker is killed, what was answered is there; of what was not, any part."""
    chance = Random(2)
    path = at(tmp_path / "image")
    guest = session(chain, path, chance)
    for count, torn in chance.sample([*tears(guest.file.log)], 60):
        data = state(guest.first, guest.file.log, count, torn)
        assert [] == guest.faults_of_a_kill(again(chain, path, data), count)


def test_a_flush_that_is_not_passed_on_is_found(tmp_path: Path) -> None:
    """The judge of these tests finds a chain guilty that answers flushes without doing them."""
    chance = Random(3)
    path = at(tmp_path / "image")
    guest = session("aio:{path}", path, chance)
    guest.file.log[:] = [each if each.kind != "flush" else Change("write") for each in guest.file.log]
    lost = state(guest.first, guest.file.log, 0)

    assert guest.faults_of_power_loss(again("aio:{path}", path, lost), len(guest.file.log))
