"""What the last release left of a disk, and how a service of this release takes it over."""

from __future__ import annotations

import errno
import mmap
import os
import random
import select
import shutil
import subprocess
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.supervisor.helpers import PATH, Kept
from xenbackend import counters, journal
from xenbackend.kernel import memfd
from xenbackend.kernel.process import OpenFile
from xenbackend.protocol import codec
from xenbackend.protocol.messages import Agreed, Connect, RingParameters
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import former
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import end_predecessor, prefix_of, sort_inherited
from xenbackend.supervisor.vbd.notes import Claimed, Exchange, Notes
from xenbackend.units import PAGE

LAST_RELEASE = "af78c78"
CONNECT = Connect("x86_64-abi", [RingParameters([8], 3)], persistent=True)
CLAIM = {"keys": {"state": "1"}, "permissions": ["n0"], "is_in_libxl": False}
NOTES = {
    "chain": "null:1G",
    "policy": "read=pause",
    "paused": True,
    "claim": CLAIM,
    "memories": {"m0": "map", "m3": "x"},
}
PREFIX = prefix_of(PATH)

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture(scope="session")
def last() -> ModuleType:
    """The last release's own journal module."""
    show = ["git", "show", f"{LAST_RELEASE}:xenbackend/journal.py"]
    module = ModuleType("journal of the last release")
    exec(subprocess.run(show, check=True, capture_output=True, cwd=Path(__file__).parent).stdout, module.__dict__)  # noqa: S102 - our own former module
    return module


def unsealed(size: int) -> int:
    """Return a memory as the last release makes one."""
    fd = os.memfd_create("xenbackend", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def fill(last: ModuleType, page: memoryview) -> None:
    """Write what a worker of the last release writes: it serves, has requests in flight, and has failed a flush."""
    page[: counters.SIZE].cast("Q")[counters.INDEX["reads"]] = 77
    last.AGREED.write(page, codec.as_fields(Agreed("null:1G", CONNECT)))
    last.NOTES.write(page, NOTES)
    last.poison(page, errno.ENOSPC)
    for number in (0, 7):
        ring = last.RingJournal(page, number, last.SLOT)
        ring.begin(32, 100)
        ring.blocks[1], ring.blocks[511] = 100 << 8 | 4, 104 << 8 | 16
        ring.answers[16:20] = array("Q", [100 << 2 | 1, 0, 101 << 2 | 2, 0])
        ring.words[last.REQ_CONS], ring.words[last.RSP_PROD] = 120, 101
        ring.block_slots(511)[-5:] = b"slots"
        ring.segments(8191)[:] = b"s" * last.SEGMENTS


class Left:
    """What a service of the last release has left with its keeper.

    journal   its journal, mapped as in the worker
    worker    the process that stands for the worker, or None
    """

    def __init__(self, kept: Kept, last: ModuleType, *, has_worker: bool) -> None:
        keeper = kept.keeper()
        fds = {"journal": unsealed(last.SIZE), "m0": unsealed(8192), "m3": unsealed(4096), "m4": unsealed(4096)}
        self.journal = memoryview(mmap.mmap(fds["journal"], last.SIZE))
        fill(last, self.journal)
        os.pwrite(fds["m0"], b"map", 5000)
        self.worker = subprocess.Popen(["sleep", "100"]) if has_worker else None
        if self.worker is not None:
            fds |= {"pidfd": os.pidfd_open(self.worker.pid), "worker": unsealed(0)}
        for name, fd in fds.items():
            keeper.keep(f"{PREFIX}.{name}", fd)
            os.close(fd)

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()


@pytest.fixture
def leave(kept: Kept, last: ModuleType) -> Iterator[Callable[..., Left]]:
    """Return a function that leaves a disk as the last release does."""
    made: list[Left] = []

    def leave(*, has_worker: bool = False) -> Left:
        made.append(Left(kept, last, has_worker=has_worker))
        return made[-1]

    yield leave
    for each in made:
        each.close()


class Mortal(Keeper):
    """A keeper whose service dies when it sends one message too many; what it sent before is taken at once."""

    def __init__(self, kept: Kept, words: int) -> None:
        super().__init__(kept._environment)
        self.inherited = kept.keeper().inherited
        self._kept = kept
        self._left = words

    def _send(self, state: str, *fds: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise SystemExit
        super()._send(state, *fds)
        assert self._kept.fds is not None


def next_one(kept: Kept, said: list[str] | None = None, words: int = 1000) -> Handover:
    """Return the handover as the next service finds it. That service dies after so many messages to the keeper."""
    keeper = Mortal(kept, words)
    found = sort_inherited(keeper, 0).get(PATH, {})
    if (pidfd := end_predecessor(keeper, PATH, found)) >= 0:
        assert select.select([pidfd], [], [], 20)[0]
    return Handover(keeper, PATH, found, (said if said is not None else []).append)


def see_all_of_it(kept: Kept, heir: Handover) -> None:
    """Check that everything has been converted, and that nothing else is left."""
    first, last_one = (journal.RingJournal(heir.page, number, journal.SLOT) for number in (0, 7))
    memories = heir.descriptors("null:1G")[1]
    expected = Notes("null:1G", None, [], "an administrator", "read=pause", Claimed(**CLAIM), {"m0": "map", "m3": "x"})

    assert [(101, 17), (103, 19), *((104 + place, 8176 + place) for place in range(16))] == first.unanswered()
    assert [(101, 18, 2)] == last_one.answering()
    assert b"slots" == first.block_slots(511)[-5:] == last_one.block_slots(511)[-5:]
    assert [120, 101, 32] == last_one.words[:3].tolist()
    assert (77, errno.ENOSPC) == (counters.snapshot(heir.page)["reads"], journal.poisoned(heir.page))
    assert (Agreed("null:1G", CONNECT), expected) == (heir.agreed(), replace(heir.notes, in_service=[]))
    assert {"map": 8192, "x": 4096} == {name: os.fstat(fd).st_size for name, fd in memories.items()}
    assert b"map" == os.pread(memories["map"], 3, 5000)
    assert all(memfd.is_sealed(fd, os.fstat(fd).st_size) for fd in (heir._journal, heir._notes, *memories.values()))
    assert {f"{PREFIX}.{name}.3" for name in ("journal", "notes", "m0", "m3")} == set(kept.fds)


def test_what_is_left_becomes_ours(kept: Kept, leave: Callable[..., Left]) -> None:
    """If no worker is left, the new service has the journal, the notes and the memories at once, and so has the next
    one.
    """
    leave()
    said: list[str] = []
    heir = next_one(kept, said)

    assert heir.worker is None
    see_all_of_it(kept, heir)
    heir.leave()
    heir = next_one(kept, said)
    see_all_of_it(kept, heir)
    heir.close()
    assert ({}, []) == (kept.fds, said)


def test_its_worker_is_ended_first(kept: Kept, last: ModuleType, leave: Callable[..., Left]) -> None:
    """The worker is killed first, and what it wrote until its death counts. Until then nothing is forgotten, and only
    the list of its open files is kept in addition.
    """
    left = leave(has_worker=True)
    before = set(kept.fds)
    keeper = kept.keeper()
    found = sort_inherited(keeper, 0)[PATH]
    pidfd = end_predecessor(keeper, PATH, found)
    assert select.select([pidfd], [], [], 20)[0]
    assert left.worker is not None
    assert -9 == left.worker.wait()
    assert before | {f"{PREFIX}.open.3"} == set(kept.fds)
    ring = last.RingJournal(left.journal, 0, last.SLOT)
    ring.answers[17] = 102 << 2 | 1
    heir = Handover(keeper, PATH, found)

    assert [(101, 18, 2), (102, 17, 1)] == journal.RingJournal(heir.page, 0, journal.SLOT).answering()
    ring.answers[17] = journal.RingJournal(heir.page, 0, journal.SLOT).answers[17] = 0
    see_all_of_it(kept, heir)
    heir.close()


def test_what_its_worker_has_open_is_known_afterwards(kept: Kept, leave: Callable[..., Left], tmp_path: Path) -> None:
    """The files that the worker had open when it was ended stay in the notes for all later services."""
    image = tmp_path / "image"
    image.write_bytes(b"x")
    left = leave()
    with image.open() as file:
        left.worker = subprocess.Popen(["sleep", "100"], stdin=file)
    keeper = kept.keeper()
    for name, fd in (("pidfd", os.pidfd_open(left.worker.pid)), ("worker", unsealed(0))):
        keeper.keep(f"{PREFIX}.{name}", fd)
        os.close(fd)
    for words in (1, 2, 1000):  # dies when it has noted the files, when it has ended the worker, later
        try:
            heir = next_one(kept, words=words)
        except SystemExit:
            continue
    heir.leave()
    heir = next_one(kept)

    (found,) = [each for each in heir.notes.in_service if each.path == str(image)]
    assert (image.stat().st_dev, image.stat().st_ino) == (found.device, found.inode)
    heir.close()
    assert {} == kept.fds


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many open files there are, and whatever their names, no more are remembered than fit."""
    files = [OpenFile("/" + "\udcff\n" * 40 + str(number), number, number) for number in range(1000)]
    monkeypatch.setattr(former.process, "files_of", lambda _pidfd: files)
    fd = former.remember_files(-1)
    found = former.recall_files(fd)
    os.close(fd)

    assert 10 < len(found) < 1000
    assert [(each.path, each.device, each.inode) for each in files[: len(found)]] == [
        (each.path, each.device, each.inode) for each in found
    ]
    empty = unsealed(8192)
    assert [] == former.recall_files(empty)
    os.close(empty)


@pytest.mark.parametrize("has_worker", [False, True])
def test_a_service_may_die_anywhere_on_the_way(kept: Kept, leave: Callable[..., Left], *, has_worker: bool) -> None:
    """If the service dies after any of its messages to the keeper, and the next one too, the one after them still has
    everything.
    """
    said, deaths = 0, 2
    while deaths:
        leave(has_worker=has_worker)
        deaths = 0
        for _ in range(2):
            try:
                next_one(kept, words=said)
            except SystemExit:
                deaths += 1
        heir = next_one(kept)
        see_all_of_it(kept, heir)
        heir.close()
        said += 1

    assert {} == kept.fds
    assert said > 7


def test_a_worker_that_nobody_can_kill_finishes_by_itself(kept: Kept, leave: Callable[..., Left]) -> None:
    """If only the worker's socket was kept, it cannot be killed: it finishes what is in flight itself, and the notes
    count.
    """
    leave(has_worker=True)
    kept.keeper().forget(f"{PREFIX}.pidfd")
    heir = next_one(kept)

    assert (None, None) == (heir.worker, heir.agreed())
    assert ([], "null:1G", "an administrator") == (journal.progress(heir.page), heir.notes.chain, heir.notes.paused)
    assert {f"{PREFIX}.{name}.3" for name in ("journal", "notes", "m0", "m3")} == set(kept.fds)
    heir.close()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, Notes()),
        ({"chain": "a", "swap": {"from": "a", "to": "b"}}, Notes("a", Exchange(0, "a", "b"))),
        ({"chain": "b", "swap": {"from": "a", "to": "b"}}, Notes("b", None, ["a"])),
        ({"swap": {"from": "a", "to": "b"}}, Notes("", Exchange(0, "a", "b"))),
        ({"chain": "a", "later": 1}, Notes("a")),
        ({"chain": "a", "policy": "of=old,write=report,read=retry 9999 every 1s"}, Notes("a", policy="write=report")),
        ({"chain": 1}, Notes()),
        ({"chain": "a", "swap": 1}, Notes()),
        ({"chain": "a", "swap": {"to": "b"}}, Notes()),
        ({"chain": "a", "memories": ["m0"]}, Notes()),
        ({"chain": "a", "claim": {"keys": 1}}, Notes()),
        ({"chain": "a", "memories": {"journal": "x", "worker": "y", "m9": "z"}}, Notes("a")),
    ],
)
def test_its_notes_have_a_meaning(kept: Kept, last: ModuleType, found: dict[str, Any], expected: Notes) -> None:
    """A noted exchange counts as under way, or as done if the noted chain is already the new one. Notes that no service
    of that release writes are ignored.
    """
    fd = unsealed(last.SIZE)
    with mmap.mmap(fd, last.SIZE) as memory:
        page = memoryview(memory)
        last.NOTES.write(page, found)
        page.release()
    keeper = kept.keeper()
    keeper.keep(f"{PREFIX}.journal", fd)
    os.close(fd)
    heir = next_one(kept)

    assert replace(expected, memories={}) == heir.notes
    assert {f"{PREFIX}.{name}.3" for name in ("journal", "notes")} == set(kept.fds)
    heir.close()


@pytest.mark.parametrize("size", [0, 1, PAGE, 2 * PAGE, 3 * PAGE, 1 << 30])
def test_what_is_no_journal_of_it_is_let_go(kept: Kept, leave: Callable[..., Left], size: int) -> None:
    """A memory that has another size, is cut short by its worker at that moment, or has another version, is ignored."""
    left = leave()
    fd = kept.fds[f"{PREFIX}.journal"]
    left.journal[PAGE + 8] = 7  # VERSION
    os.ftruncate(fd, size)
    heir = next_one(kept)

    assert (Notes(), None, []) == (heir.notes, heir.agreed(), journal.progress(heir.page))
    assert {f"{PREFIX}.{name}.3" for name in ("journal", "notes")} == set(kept.fds)
    heir.close()


def test_a_memory_that_was_cut_short_is_told(kept: Kept, leave: Callable[..., Left]) -> None:
    """A layer's memory that was cut short is dropped, and that is logged; the disk is served."""
    leave()
    os.ftruncate(kept.fds[f"{PREFIX}.m0"], 0)
    said: list[str] = []
    heir = next_one(kept, said)

    assert {"m3": "x"} == heir.notes.memories
    assert 1 == len(said)
    assert "the memory of layer map is lost" in said[0]
    heir.close()


def test_whatever_lies_in_it_is_no_error(kept: Kept, leave: Callable[..., Left]) -> None:
    """No contents of a journal make the takeover fail, as its worker may have written anything into it."""
    dice = random.Random(1)
    left = leave()
    whole = bytes(left.journal[: 50 * PAGE])
    fd = os.dup(kept.fds[f"{PREFIX}.journal"])
    found = set()
    for _ in range(300):
        left.journal[: 50 * PAGE] = whole
        for _ in range(dice.choice((1, 10, 1000))):
            place = dice.choice((PAGE, 2 * PAGE, 10 * PAGE, 18 * PAGE, 34 * PAGE)) + dice.randrange(300)
            left.journal[place] = dice.choice((0, 1, 2, 91, 123, 255, dice.randrange(256)))
        found.add(former.read_notes(fd).chain)
    left.journal[PAGE : 50 * PAGE] = whole[PAGE:]
    left.journal[2 * PAGE : 18 * PAGE] = dice.randbytes(16 * PAGE)
    os.close(fd)
    heir = next_one(kept)

    assert {"", "null:1G"} <= found
    assert (None, "null:1G") == (heir.agreed(), heir.notes.chain)
    heir.close()
