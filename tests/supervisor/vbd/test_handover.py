"""What a vbd's workers leave to their successors, and a service to the next one."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from types import ModuleType
from typing import Any

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept
from xenbackend import journal
from xenbackend.errors import KernelError
from xenbackend.kernel import memfd
from xenbackend.protocol import codec, messages
from xenbackend.protocol.messages import MAX_MEMORIES, Agreed
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd import former as release_before
from xenbackend.supervisor.vbd import notes
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import current, end_predecessor, prefix_of, sort_inherited
from xenbackend.supervisor.vbd.notes import Exchange, Notes

CONNECT = messages.Connect("x86_64-abi", [messages.RingParameters([8], 3)], persistent=True)
EMPTY = [f"{prefix_of(PATH)}.journal.3", f"{prefix_of(PATH)}.notes.3"]  # what is kept of every disk


def serves(handover: Handover, chain: str, order: int = 0) -> None:
    """Do what a worker does that serves a chain, put in by an order."""
    journal.AGREED.write(handover.page, codec.as_fields(Agreed(chain, CONNECT, order)))


def _unless(kind: type, die: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `die` for a value of one type, and else another function."""
    return lambda value: die() if isinstance(value, kind) else function(value)


def made(content: bytes) -> int:
    """Return the descriptor of a memory."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def next_one(kept: Kept) -> Handover:
    """Return the handover as the next service finds it."""
    keeper = kept.keeper()
    return Handover(keeper, PATH, sort_inherited(keeper, 0).get(PATH))


def test_the_next_worker_of_the_chain_gets_the_memories() -> None:
    """A memory kept under a name is handed on under that name; a later one of the same name replaces it."""
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
    """Memories belong to one chain: when another chain is opened, they are gone for good."""
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
    """The number of memories is bounded, whatever a worker asks openers for: one too many is refused and closed, and
    dropping one makes room.
    """
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    before = len(open_descriptors())
    refusals = [handover.keep(str(number), made(b"")) for number in range(MAX_MEMORIES + 5)]
    held = len(open_descriptors()) - before
    handover.drop("0")
    handover.drop("0")
    handover.keep("one more", made(b""))

    assert ["a disk has at most 64 memories"] * 5 == [each for each in refusals if each]
    assert MAX_MEMORIES == held == len(handover.descriptors("null:1G")[1])
    handover.close()


def test_the_next_service_finds_all_of_it(kept: Kept) -> None:
    """Journal, notes and memories pass from service to service through the keeper, each under its name."""
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("log:|ram:1M")
    for name in ("one", "two", "three"):
        handover.keep(name, made(name.encode()))
    handover.drop("two")
    handover.note(paused="root")
    handover.page[0] = 7
    handover.leave()
    heir = next_one(kept)
    heir.keep("four", made(b"four"))
    heir.leave()
    heir = next_one(kept)

    assert (7, "root") == (heir.page[0], heir.notes.paused)
    contents = {name: os.pread(fd, 8, 0) for name, fd in heir.descriptors("log:|ram:1M")[1].items()}
    assert {each: each.encode() for each in ("one", "three", "four")} == contents
    heir.close()
    assert {} == kept.fds


def test_what_nobody_had_noted_is_let_go(kept: Kept) -> None:
    """If a service dies after it has kept a memory and before it has noted which, the next one forgets it, so that it
    cannot be taken for another one.
    """
    handover = Handover(kept.keeper(), PATH)
    handover._keep("m0", 0)
    handover.leave()
    heir = next_one(kept)

    assert EMPTY == list(kept.fds)
    assert {} == heir.descriptors("")[1]
    heir.close()


def test_a_worker_is_found_by_its_descriptors(kept: Kept) -> None:
    """The next service gets the socket and the pidfd of a worker, unless it has ended."""
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
    """If only a worker's pidfd was kept, the worker is killed, as it cannot be told to close; its end is noticed like
    any other.
    """
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
    assert b"" == os.read(heir.worker[0], 1)  # as from a worker that has gone
    heir.close()


def test_a_worker_that_nobody_took_over_is_killed_before_its_memories_are_wiped(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that is wiped below a worker that serves would be taken for one of an empty disk."""
    with subprocess.Popen(["sleep", "60"]) as process:
        handover = Handover(kept.keeper(), PATH)
        handover.keep("map", memfd.make("test", 4096))
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pidfd_open(process.pid)
        handover.keep_worker(near.fileno(), own)
        handover.leave()
        heir = next_one(kept)
        assert heir.worker is not None
        has_ended: list[bool] = []
        pidfd = heir.worker[1]
        monkeypatch.setattr(memfd, "wipe", lambda _: has_ended.append(bool(select.select([pidfd], [], [], 5)[0])))
        heir.close()
        process.kill()
    for fd in (near.detach(), far.detach(), own):
        os.close(fd)

    assert ([True], -9) == (has_ended, process.returncode)


@pytest.mark.parametrize(
    ("module", "name", "number", "what"),
    [
        (memfd, "map_sealed", 1, "journal"), (memfd, "map_sealed", 2, "notes"), (memfd, "make", 1, ""),
        (memfd, "make", 2, ""), (socket, "socketpair", 1, "pidfd"), (release_before, "read_notes", 1, "open"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_over_now_is_closed(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, number: int, what: str
) -> None:
    """If any call fails because the host is short of something, all descriptors are closed: the takeover is tried again
    every second.
    """
    made_before = Handover(Keeper({}), PATH)
    copies = {current("journal"): os.dup(made_before._journal), current("notes"): os.dup(made_before._notes)}
    if what == "pidfd":  # only the pidfd is kept, and not the worker's socket
        copies[current(what)] = made(b"pidfd")
        monkeypatch.setattr("xenbackend.supervisor.vbd.handover.kill", lambda _: None)
    elif what == "open":  # the last release's, whose notes have to be converted
        copies = {("journal", 2): copies[current("journal")], current("open"): copies[current("notes")]}
    elif not what:
        for fd in copies.values():
            os.close(fd)
        copies = {current("m0"): made(b"map")}
    calls = count(1)
    real = getattr(module, name)

    def call(*arguments: Any) -> Any:
        if next(calls) == number:
            raise OSError(errno.EMFILE, "too many")
        return real(*arguments)

    monkeypatch.setattr(module, name, call)
    before = len(open_descriptors()) - len(copies)
    with pytest.raises(OSError, match="too many"):
        Handover(Keeper({}), PATH, copies)
    after = len(open_descriptors())
    made_before.close()

    assert before == after


def test_a_socket_without_a_process_is_let_go(kept: Kept) -> None:
    """If only a worker's socket was kept, it is closed, at which the worker closes its disk in order."""
    handover = Handover(kept.keeper(), PATH)
    handover._keep("worker", 0)
    handover.leave()
    heir = next_one(kept)

    assert heir.worker is None
    assert EMPTY == list(kept.fds)
    heir.close()


@pytest.mark.parametrize("what", ["unsealed", "smaller", "notes", "gone"])
def test_what_could_be_cut_short_is_not_mapped(kept: Kept, what: str) -> None:
    """A journal or notes that are not sealed, or have another size, are replaced by new ones; the worker that has them
    is killed, and its end is noticed like any other.
    """
    said: list[str] = []
    process = subprocess.Popen(["sleep", "100"])
    pidfd = os.pidfd_open(process.pid)
    handover = Handover(kept.keeper(), PATH)
    handover.note(paused="root")
    handover.keep_worker(0, pidfd)
    os.close(pidfd)
    handover.leave()
    name = f"{prefix_of(PATH)}.{'notes' if what == 'notes' else 'journal'}.3"
    keeper = kept.keeper()
    keeper.forget(name)
    if what != "gone":
        fd = memfd.make("test", 4096) if what == "smaller" else made(b"")
        if what != "smaller":
            os.ftruncate(fd, journal.SIZE if what == "unsealed" else notes.SIZE)
        keeper.keep(name, fd)
    keeper = kept.keeper()
    heir = Handover(keeper, PATH, sort_inherited(keeper, 0)[PATH], said.append)

    assert heir.worker is not None
    assert select.select([heir.worker[1]], [], [], 20)[0]
    assert -9 == process.wait()
    assert (what != "gone") == any("cannot be used" in each for each in said)
    assert (None if what == "notes" else "root") == heir.notes.paused
    assert memfd.is_sealed(kept.fds[f"{prefix_of(PATH)}.journal.3"], journal.SIZE)
    heir.close()


def test_a_worker_of_another_protocol_is_replaced_by_its_journal(kept: Kept) -> None:
    """A worker that differs only in the version of its messages is ended, and its journal and notes are used as they
    are.
    """
    process = subprocess.Popen(["sleep", "100"])
    pidfd = os.pidfd_open(process.pid)
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("null:1G")
    serves(handover, "null:1G")
    handover.leave()
    keeper = kept.keeper()
    for what in ("pidfd", "worker"):
        keeper.keep(f"{prefix_of(PATH)}.{what}", pidfd)
    os.close(pidfd)
    keeper = kept.keeper()
    found = sort_inherited(keeper, 0)[PATH]
    assert select.select([end_predecessor(keeper, PATH, found)], [], [], 20)[0]
    heir = Handover(keeper, PATH, found)

    assert -9 == process.wait()
    assert (None, Agreed("null:1G", CONNECT), EMPTY) == (heir.worker, heir.agreed(), list(kept.fds))
    heir.close()


def test_no_worker_can_cut_a_journal_short() -> None:
    """A worker cannot change the size of the journal that it is given."""
    handover = Handover(Keeper({}), PATH)
    fd, _ = handover.descriptors("null:1G")
    for size in (0, 4096, 2 * journal.SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)

    assert 0 == handover.page[journal.SIZE - 1]
    handover.close()


def test_a_memory_may_be_anything() -> None:
    """A memory that a former version's worker made is handed on without being read: it may shrink at any time."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    fd = made(b"x" * 4096)
    far = os.dup(fd)
    assert not handover.keep("map", fd)
    os.ftruncate(far, 0)

    assert [0] == [os.fstat(each).st_size for each in handover.descriptors("null:1G")[1].values()]
    handover.close()
    os.close(far)


def test_what_is_in_service_stands_in_the_journal() -> None:
    """What a worker noted in the journal is read back, if it was told to serve that chain. Anything else counts as
    nothing in service, and is no error.
    """
    handover = Handover(Keeper({}), PATH)
    nothing = handover.agreed()
    handover.note(chain="null:1G", exchange=Exchange(1, "null:1G", "null:2G"))
    serves(handover, "null:1G")
    found = handover.agreed()
    serves(handover, "null:2G")
    exchanged = handover.agreed()
    serves(handover, "aio:/etc/shadow")

    assert (None, Agreed("null:1G", CONNECT), Agreed("null:2G", CONNECT)) == (nothing, found, exchanged)
    assert handover.agreed() is None
    assert "null:1G" == handover.chain_in_service()
    handover.close()


@pytest.mark.parametrize(
    "value",
    [
        {"chain": "null:1G"}, {"connect": codec.as_fields(CONNECT)}, {"chain": "null:1G", "connect": None},
        {"chain": "null:1G", "connect": {"rings": 5}}, {"chain": 1, "connect": codec.as_fields(CONNECT)},
        {"chain": "null:1G", "connect": codec.as_fields(CONNECT), "more": 1},
        {"chain": "null:1G", "connect": {**codec.as_fields(CONNECT), "rings": [{"grefs": [2**64]}]}},
        {"chain": ["null:1G"], "connect": codec.as_fields(CONNECT)}, {},
    ],
)  # fmt: skip
def test_what_no_worker_agrees_is_nothing(value: dict[str, object]) -> None:
    """AGREED is checked as strictly as a message; anything invalid counts as nothing."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    journal.AGREED.write(handover.page, value)

    assert handover.agreed() is None
    handover.close()


@pytest.mark.parametrize("depth", [1, 300, 900, 950, 980, 1000, 30_000])
def test_nothing_is_too_deep_to_be_refused(depth: int) -> None:
    """However deeply a worker nests what it writes, it counts as nothing agreed, and is no error."""
    handover = Handover(Keeper({}), PATH)
    handover.descriptors("null:1G")
    for text in (b"[" * depth, b'{"chain": ' + b"[" * depth + b"]" * depth + b', "connect": {}}'):
        journal.AGREED.write(handover.page, {})
        at = bytes(handover.page[: journal.RINGS_AT]).rindex(b"\2\0\0\0\0\0\0\0{}")
        length = min(len(text), 8 * 4096 - 8)
        handover.page[at : at + 8 + length] = length.to_bytes(8, "little") + text[:length]
        assert handover.agreed() is None
    handover.close()


def test_a_chain_that_was_put_in_is_told_from_one_that_was_only_asked_for(kept: Kept) -> None:
    """An order alone does not change the chain in service. The worker's note in the journal does, and so do our own
    notes once it has told us, until `params` has the chain, also in the next service.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("null:1G")
    handover.note(exchange=Exchange(1, "params", "null:2G"))
    asked = handover.chain_in_service()
    serves(handover, "null:2G")
    served = handover.chain_in_service()
    handover.exchange_is_done()
    journal.AGREED.write(handover.page, None)
    handover.leave()
    heir = next_one(kept)
    noted = heir.notes.stale_params, heir.chain_in_service()
    heir.saw_params("null:2G")

    assert ("null:1G", "null:2G", (["params", "null:1G"], "null:2G")) == (asked, served, noted)
    assert ("null:2G", Notes("null:2G", exchanged_by=1)) == (heir.chain_in_service(), heir.notes)
    heir.close()


def test_a_chain_is_put_in_without_a_worker(kept: Kept) -> None:
    """If a chain is put in without a worker, what the frontend had agreed with the last worker is kept, even for the
    same chain, where only the order number changes. The memories stay for the next worker, which knows what it wants.
    """
    for chain, former in (("null:2G", ["params", "null:1G"]), ("null:1G", [])):
        handover = Handover(kept.keeper(), PATH)
        handover.descriptors("null:1G")
        handover.keep("map", made(b"one"))
        handover.note(undecided="null:3G")
        serves(handover, "null:1G", 3)
        handover.exchange_alone(Exchange(4, "params", chain))
        handover.leave()
        heir = next_one(kept)
        agreed = heir.agreed()

        assert agreed is not None
        assert (chain, CONNECT, 4) == (agreed.chain, agreed.connect, agreed.order)
        assert Notes(chain, stale_params=former, memories={"m0": "map"}, exchanged_by=4) == heir.notes
        assert ["map"] == [*heir.descriptors(chain)[1]]
        heir.close()


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_service_that_dies_while_it_puts_a_chain_in_leaves_no_doubt(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """If the service dies while it puts in a chain itself, the journal decides: before its entry the former chain is in
    service, afterwards the new one.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("null:1G")
    serves(handover, "null:1G", 3)

    def die(*_: object) -> None:
        raise InterruptedError

    if dies == "before":
        monkeypatch.setattr(codec, "as_fields", _unless(Agreed, die, codec.as_fields))
    else:
        monkeypatch.setattr(handover, "exchange_is_done", die)
    with pytest.raises(InterruptedError):
        handover.exchange_alone(Exchange(4, "params", "null:2G"))
    handover.leave()
    heir = next_one(kept)

    assert (dies == "after", dies == "after") == (heir.has_exchanged(), heir.chain_in_service() == "null:2G")
    heir.close()


def test_a_failed_flush_is_noted_and_forgiven() -> None:
    """A failed flush that a service finds in xenstore is noted for the next worker, until it is cleared."""
    handover = Handover(Keeper({}), PATH)
    handover.poison_for("")
    nothing = journal.poisoned(handover.page)
    handover.poison_for("a flush failed")
    noted = journal.poisoned(handover.page)
    handover.poison(errno.ENOSPC)
    handover.poison_for("a flush failed")
    exact = journal.poisoned(handover.page)
    handover.poison(0)

    assert (0, errno.EIO, errno.ENOSPC, 0) == (nothing, noted, exact, journal.poisoned(handover.page))
    handover.close()


def test_a_keeper_in_trouble_keeps_no_disk_from_being_served(kept: Kept) -> None:
    """If the keeper fails, everything works for this service; that the next one will lack it is logged."""
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
    assert all("the next service will not have it" in each for each in said)


def test_a_host_without_memory_for_the_notes_keeps_no_journal_open(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no memory for the notes, the journal and all inherited descriptors are closed, since the registry
    tries again and again.
    """
    handover = Handover(kept.keeper(), PATH)
    handover.descriptors("null:1G")
    handover.keep("map", made(b"map"))
    handover.leave()
    kept.keeper().forget(f"{prefix_of(PATH)}.notes.3")
    keeper = kept.keeper()
    found = sort_inherited(keeper, 0)[PATH]
    del handover
    before = len(open_descriptors()) - len(found)
    make = memfd.make
    monkeypatch.setattr(memfd, "make", lambda name, size: make(name, 2**63 if "notes" in name else size))
    for each in (None, found):
        with pytest.raises(KernelError):
            Handover(keeper, PATH, each)

    assert before == len(open_descriptors())


def test_what_is_dropped_is_wiped() -> None:
    """A memory is overwritten when it is dropped, by a detach, for another chain or at the worker's wish, since it may
    hold a key.
    """
    views = []

    def keep(handover: Handover, name: str) -> None:
        fd = memfd.make("test", 4096)
        views.append(memfd.map_sealed(fd, 4096))
        views[-1][:] = b"k" * 4096
        assert not handover.keep(name, fd)

    handover = Handover(Keeper({}), PATH)
    handover.descriptors("a")
    keep(handover, "dropped")
    handover.drop("dropped")
    keep(handover, "of another chain")
    handover.descriptors("b")
    keep(handover, "at the end")
    assert b"k" == bytes(views[-1][:1])
    handover.close()

    assert [bytes(4096)] * 3 == [bytes(view) for view in views]
