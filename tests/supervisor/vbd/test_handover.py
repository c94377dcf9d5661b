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
from xenbackend import journal
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.protocol.messages import MAX_MEMORIES
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd.handover import Handover, prefix_of, sort_inherited
from xenbackend.supervisor.xenstore.paths import VbdPath

AGREED = messages.Connect("x86_64-abi", [messages.RingParameters([8], 3)], persistent=True)


def made(content: bytes) -> int:
    """Return a memory's descriptor."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def next_one(kept: Kept) -> Handover:
    """Return the handover as the next service finds it."""
    keeper = kept.keeper()
    return Handover(keeper, PATH, sort_inherited(keeper, 0).get(PATH))


def test_the_next_worker_of_the_chain_gets_the_memories() -> None:
    """What was kept under a name is handed on under that name; a later one of that name takes its place."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("log:|ram:1M")
    handover.keep("map", made(b"old"))
    handover.keep("map", made(b"new"))
    page, memories = handover.descriptors("log:|ram:1M")

    assert ["map"] == list(memories)
    assert b"new" == os.pread(memories["map"], 8, 0)
    assert journal.SIZE == os.fstat(page).st_size
    handover.close()


def test_another_chain_gets_none() -> None:
    """A memory says something about one disk: with another chain it is gone for good."""
    before = len(open_descriptors())
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("log:|aio:/one")
    handover.keep("map", made(b"one"))

    assert {} == handover.descriptors("log:|aio:/two")[1]
    assert {} == handover.descriptors("log:|aio:/one")[1]
    handover.close()
    del handover
    assert before == len(open_descriptors())


def test_there_is_a_bound() -> None:
    """A worker that goes mad fills no table: one too many is closed, and one that is dropped makes place."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    before = len(open_descriptors())
    for number in range(MAX_MEMORIES + 5):
        handover.keep(str(number), made(b""))
    held = len(open_descriptors()) - before
    handover.drop("0")
    handover.drop("0")
    handover.keep("one more", made(b""))

    assert MAX_MEMORIES == held == len(handover.descriptors("null:1G")[1])
    handover.close()


def test_the_next_service_finds_all_of_it(kept: Kept) -> None:
    """Journal, notes and memories go from service to service by the keeper, each under its name."""
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("log:|ram:1M")
    for name in ("one", "two", "three"):
        handover.keep(name, made(name.encode()))
    handover.drop("two")
    handover.note(paused=True)
    handover.page[0] = 7
    handover.leave()
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
    handover = Handover(kept.keeper(), PATH)
    handover._keep("m0", 0)
    handover.leave()
    heir = next_one(kept)

    assert [f"{prefix_of(PATH)}.journal"] == list(kept.fds)
    assert {} == heir.descriptors("")[1]
    heir.close()


def test_a_worker_is_found_by_its_descriptors(kept: Kept) -> None:
    """The socket and the pidfd of a worker come back to the next service; once it has ended they do not."""
    handover = Handover(kept.keeper(), PATH)
    handover.keep_worker(made(b"socket"), made(b"pidfd"))
    handover.leave()
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
    handover = Handover(kept.keeper(), PATH)
    pidfd = os.pidfd_open(process.pid)
    handover._keep("pidfd", pidfd)
    handover.leave()
    heir = next_one(kept)
    assert heir.worker is not None
    assert select.select([heir.worker[1]], [], [], 20)[0]
    process.communicate()

    assert -9 == process.returncode
    assert b"" == os.read(heir.worker[0], 1)  # as of a worker that has gone
    heir.close()


def test_a_socket_without_a_process_is_let_go(kept: Kept) -> None:
    """The worker at its other end sees that nobody is there, and closes its disk in order."""
    handover = Handover(kept.keeper(), PATH)
    handover._keep("worker", 0)
    handover.leave()
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
    handover = Handover(Keeper({}), PATH)
    nothing = handover.agreed()
    journal.AGREED.write(handover.page, {"chain": "null:1G", "connect": messages.as_fields(AGREED)})
    found = handover.agreed()
    journal.AGREED.write(handover.page, {"chain": "null:1G"})
    lacking = handover.agreed()
    journal.AGREED.write(handover.page, {"chain": "null:1G", "connect": {"rings": 5}})
    odd = handover.agreed()
    place = bytes(handover.page).index(b'{"chain"')
    handover.page[place] = 0
    broken = handover.agreed()

    assert (None, ("null:1G", AGREED), None, None, None) == (nothing, found, lacking, odd, broken)
    handover.close()


def test_a_chain_that_was_put_in_is_told_from_one_that_was_only_asked_for() -> None:
    """The worker's note says which chain serves, and so does ours once it has told us; an order alone does not."""
    handover = Handover(Keeper({}), PATH)
    handover.note(chain="null:1G", swap={"from": "null:1G", "to": "null:2G"})
    asked = handover.swapped()
    journal.AGREED.write(handover.page, {"chain": "null:2G", "connect": messages.as_fields(AGREED)})
    served = handover.swapped()
    journal.AGREED.write(handover.page, None)
    handover.note(chain="null:2G")

    assert (None, ("null:1G", "null:2G")) == (asked, served)
    assert served == handover.swapped()
    handover.note(swap=None)
    assert handover.swapped() is None
    handover.close()


def test_notes_have_a_bound(kept: Kept) -> None:
    """What does not fit is refused with a sentence, and what was noted before holds; a memory with such a name outlives
    its worker all the same.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.note(paused=True, chain="")
    with pytest.raises(ConfigError, match="cannot remember"):
        handover.note(policy="x" * 100_000)
    handover.keep("x" * 100_000, made(b"long"))

    assert {"paused": True, "chain": ""} == handover.notes == journal.NOTES.read(handover.page)
    assert 1 == len(handover.descriptors("")[1])
    assert [f"{prefix_of(PATH)}.journal"] == list(kept.fds)
    handover.close()


def test_a_failed_flush_can_be_forgiven() -> None:
    """What a worker noted counts no more for the next one."""
    handover = Handover(Keeper({}), PATH)
    journal.poison(handover.page, 5)
    handover.forgive()

    assert 0 == journal.poisoned(handover.page)
    handover.close()


def test_a_keeper_in_trouble_keeps_no_disk_from_being_served(kept: Kept) -> None:
    """Everything works for this service; that the next one would have to do without is told."""
    keeper = kept.keeper()
    kept.close()
    said: list[str] = []
    handover = Handover(keeper, PATH, None, said.append)
    handover.descriptors("null:1G")
    handover.keep("map", made(b"map"))
    handover.keep_worker(0, 0)
    handover.forget_worker()
    memories = list(handover.descriptors("null:1G")[1])
    handover.close()

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
