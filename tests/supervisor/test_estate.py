"""What a vbd's workers leave to each other, and one service to the next."""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import sys

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept
from xenbackend import control, journal
from xenbackend.control import MAX_MEMORIES
from xenbackend.errors import ConfigError
from xenbackend.supervisor.estate import Estate, prefix_of, sort_inherited
from xenbackend.supervisor.keeper import Keeper
from xenbackend.supervisor.paths import VbdPath

AGREED = control.Connect("x86_64-abi", [control.RingParameters([8], 3)], persistent=True)


def made(content: bytes) -> int:
    """Return a memory's descriptor."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def next_one(kept: Kept) -> Estate:
    """Return the estate as the next service finds it."""
    keeper = kept.keeper()
    return Estate(keeper, PATH, sort_inherited(keeper, 0).get(PATH))


def test_the_next_worker_of_the_chain_gets_the_memories() -> None:
    """What was kept under a name is handed on under that name; a later one of that name takes its place."""
    estate = Estate(Keeper({}), PATH)
    estate.descriptors("log:|ram:1M")
    estate.keep("map", made(b"old"))
    estate.keep("map", made(b"new"))
    page, memories = estate.descriptors("log:|ram:1M")

    assert ["map"] == list(memories)
    assert b"new" == os.pread(memories["map"], 8, 0)
    assert journal.SIZE == os.fstat(page).st_size
    estate.close()


def test_another_chain_gets_none() -> None:
    """A memory says something about one disk: with another chain it is gone for good."""
    before = len(open_descriptors())
    estate = Estate(Keeper({}), PATH)
    estate.descriptors("log:|aio:/one")
    estate.keep("map", made(b"one"))

    assert {} == estate.descriptors("log:|aio:/two")[1]
    assert {} == estate.descriptors("log:|aio:/one")[1]
    estate.close()
    del estate
    assert before == len(open_descriptors())


def test_there_is_a_bound() -> None:
    """A worker that goes mad fills no table: one too many is closed, and one that is dropped makes place."""
    estate = Estate(Keeper({}), PATH)
    estate.descriptors("null:1G")
    before = len(open_descriptors())
    for number in range(MAX_MEMORIES + 5):
        estate.keep(str(number), made(b""))
    held = len(open_descriptors()) - before
    estate.drop("0")
    estate.drop("0")
    estate.keep("one more", made(b""))

    assert MAX_MEMORIES == held == len(estate.descriptors("null:1G")[1])
    estate.close()


def test_the_next_service_finds_all_of_it(kept: Kept) -> None:
    """Journal, notes and memories go from service to service by the keeper, each under its name."""
    estate = Estate(kept.keeper(), PATH)
    estate.descriptors("log:|ram:1M")
    for name in ("one", "two", "three"):
        estate.keep(name, made(name.encode()))
    estate.drop("two")
    estate.note(paused=True)
    estate.page[0] = 7
    estate.leave()
    heir = next_one(kept)
    heir.keep("four", made(b"four"))
    heir.leave()
    heir = next_one(kept)

    assert (7, True) == (heir.page[0], heir.notes["paused"])
    contents = {name: os.pread(fd, 8, 0) for name, fd in heir.descriptors("log:|ram:1M")[1].items()}
    assert {each: each.encode() for each in ("one", "three", "four")} == contents
    heir.close()
    assert {} == kept.fds


def test_what_nobody_had_noted_is_let_go(kept: Kept) -> None:
    """A service that died between keeping a memory and noting what it is leaves nothing that could be taken for another
    one's later.
    """
    estate = Estate(kept.keeper(), PATH)
    estate._keep("m0", 0)
    estate.leave()
    heir = next_one(kept)

    assert [f"{prefix_of(PATH)}.journal"] == list(kept.fds)
    assert {} == heir.descriptors("")[1]
    heir.close()


def test_a_worker_is_found_by_its_descriptors(kept: Kept) -> None:
    """The socket and the pidfd of a worker come back to the next service; once it has ended they do not."""
    estate = Estate(kept.keeper(), PATH)
    estate.keep_worker(made(b"socket"), made(b"pidfd"))
    estate.leave()
    heir = next_one(kept)
    assert heir.worker is not None
    contents = [os.pread(fd, 8, 0) for fd in heir.worker]
    heir.forget_worker()
    heir.leave()
    last = next_one(kept)

    assert [b"socket", b"pidfd"] == contents
    assert last.worker is None
    last.close()


@pytest.mark.slow
def test_a_worker_that_cannot_be_talked_to_is_ended_first(kept: Kept) -> None:
    """Where only its pidfd was kept nobody could tell it to go away: it is killed, and seen to end like any other."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    estate = Estate(kept.keeper(), PATH)
    pidfd = os.pidfd_open(process.pid)
    estate._keep("pidfd", pidfd)
    estate.leave()
    heir = next_one(kept)
    assert heir.worker is not None
    assert select.select([heir.worker[1]], [], [], 20)[0]
    process.communicate()

    assert -9 == process.returncode
    assert b"" == os.read(heir.worker[0], 1)  # as of a worker that has gone
    heir.close()


def test_a_socket_without_a_process_is_let_go(kept: Kept) -> None:
    """The worker at its other end sees that nobody is there, and closes its disk in order."""
    estate = Estate(kept.keeper(), PATH)
    estate._keep("worker", 0)
    estate.leave()
    heir = next_one(kept)

    assert heir.worker is None
    assert [f"{prefix_of(PATH)}.journal"] == list(kept.fds)
    heir.close()


@pytest.mark.parametrize("what", ["size", "version"])
def test_a_journal_of_another_program_is_not_read(kept: Kept, what: str) -> None:
    """A new one is begun in its place; what the worker knows is the worker's to finish."""
    fd = made(b"")
    os.ftruncate(fd, journal.SIZE if what == "version" else 4096)
    if what == "version":
        with mmap.mmap(fd, journal.SIZE) as memory:
            page = memoryview(memory)
            journal.NOTES.write(page, {"paused": True})
            words = page[4096:8192].cast("Q")
            words[1] += 1
            words.release()
            page.release()
    keeper = kept.keeper()
    keeper.keep(f"{prefix_of(PATH)}.journal", fd)
    os.close(fd)
    heir = next_one(kept)

    assert (False, {}) == (heir.is_readable, heir.notes)
    assert journal.SIZE == os.fstat(kept.fds[f"{prefix_of(PATH)}.journal"]).st_size
    assert next_one(kept).is_readable
    heir.close()


def test_what_is_in_service_stands_in_the_journal() -> None:
    """What a worker noted is read back; where its memory holds nonsense nothing is in service, and nothing breaks."""
    estate = Estate(Keeper({}), PATH)
    nothing = estate.agreed()
    journal.AGREED.write(estate.page, {"chain": "null:1G", "connect": control.as_fields(AGREED)})
    found = estate.agreed()
    journal.AGREED.write(estate.page, {"chain": "null:1G"})
    lacking = estate.agreed()
    journal.AGREED.write(estate.page, {"chain": "null:1G", "connect": {"rings": 5}})
    odd = estate.agreed()
    place = bytes(estate.page).index(b'{"chain"')
    estate.page[place] = 0
    broken = estate.agreed()

    assert (None, ("null:1G", AGREED), None, None, None) == (nothing, found, lacking, odd, broken)
    estate.close()


def test_a_chain_that_was_put_in_is_told_from_one_that_was_only_asked_for() -> None:
    """The worker's note says which chain serves, and so does ours once it has told us; an order alone does not."""
    estate = Estate(Keeper({}), PATH)
    estate.note(chain="null:1G", swap={"from": "null:1G", "to": "null:2G"})
    asked = estate.swapped()
    journal.AGREED.write(estate.page, {"chain": "null:2G", "connect": control.as_fields(AGREED)})
    served = estate.swapped()
    journal.AGREED.write(estate.page, None)
    estate.note(chain="null:2G")

    assert (None, ("null:1G", "null:2G")) == (asked, served)
    assert served == estate.swapped()
    estate.note(swap=None)
    assert estate.swapped() is None
    estate.close()


def test_notes_have_a_bound(kept: Kept) -> None:
    """What does not fit is refused with a sentence, and what was noted before holds; a memory with such a name outlives
    its worker all the same.
    """
    estate = Estate(kept.keeper(), PATH)
    estate.note(paused=True, chain="")
    with pytest.raises(ConfigError, match="cannot remember"):
        estate.note(policy="x" * 100_000)
    estate.keep("x" * 100_000, made(b"long"))

    assert {"paused": True, "chain": ""} == estate.notes == journal.NOTES.read(estate.page)
    assert 1 == len(estate.descriptors("")[1])
    assert [f"{prefix_of(PATH)}.journal"] == list(kept.fds)
    estate.close()


def test_a_failed_flush_can_be_forgiven() -> None:
    """What a worker noted counts no more for the next one."""
    estate = Estate(Keeper({}), PATH)
    journal.poison(estate.page, 5)
    estate.forgive()

    assert 0 == journal.poisoned(estate.page)
    estate.close()


def test_a_keeper_in_trouble_keeps_no_disk_from_being_served(kept: Kept) -> None:
    """Everything works for this service; that the next one would have to do without is told."""
    keeper = kept.keeper()
    kept.close()
    said: list[str] = []
    estate = Estate(keeper, PATH, None, said.append)
    estate.descriptors("null:1G")
    estate.keep("map", made(b"map"))
    estate.keep_worker(0, 0)
    estate.forget_worker()
    memories = list(estate.descriptors("null:1G")[1])
    estate.close()

    assert (["map"], True) == (memories, len(said) > 4)
    assert all("the next service would have to do without" in each for each in said)


def test_names_tell_whose_they_are(kept: Kept) -> None:
    """Descriptors are sorted by vbd, whatever the order; names that are nobody's are closed and forgotten."""
    other = VbdPath("vbd3", 0, 7, 768)
    keeper = kept.keeper()
    for name in (
        "vbd-0-5-51712.journal",
        "vbd3-0-7-768.m0",
        "vbd-0-5-51712.worker",
        "x",
        "vbd-1-5-51712.m0",
        "a-b-c-d.e",
    ):
        keeper.keep(name, 0)
    assert 6 == len(kept.fds)
    before = len(open_descriptors())
    keeper = kept.keeper()
    found = sort_inherited(keeper, 0)

    assert {PATH: {"journal", "worker"}, other: {"m0"}} == {path: set(fds) for path, fds in found.items()}
    assert 3 == len(open_descriptors()) - before
    assert 3 == len(kept.fds)
    for fds in found.values():
        for fd in fds.values():
            os.close(fd)
