"""What an earlier service has left, taken over by fake vbds; the workers are processes that only sleep."""

from __future__ import annotations

import io
import os
import resource
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from tests.supervisor.fake_vbd import FakeVbd, Place
from tests.supervisor.helpers import PATH, Kept, write_like_libxl
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import VERSION
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.vbd.inheritance import prefix_of
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

OTHER = VbdPath("vbd", 0, 6, 51712)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("descriptors")]


class Left:
    """A keeper with a vbd's descriptors, and the process that stands for its worker."""

    def __init__(self, kept: Kept, path: VbdPath, version: str = f".{VERSION}") -> None:
        keeper = kept.keeper()
        self.process = subprocess.Popen(["sleep", "1000"])
        self.pidfd = os.pidfd_open(self.process.pid)
        memory = os.memfd_create("left")
        keeper.keep(f"{prefix_of(path)}.pidfd{version}", self.pidfd)
        keeper.keep(f"{prefix_of(path)}.journal{version}", memory)
        os.close(memory)
        for fd in keeper.inherited.values():
            os.close(fd)

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Return whether the process ends within so many seconds."""
        return bool(select.select([self.pidfd], [], [], timeout_s)[0])

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)


@pytest.fixture
def left(kept: Kept) -> Iterator[Left]:
    """What is left of a vbd in service."""
    left = Left(kept, PATH)
    yield left
    left.close()


def test_a_vbd_goes_on_with_what_was_left(xenstored: Xenstored, toolstack: Store, kept: Kept, left: Left) -> None:
    """A vbd gets the descriptors that were left of it, even if its node has gone meanwhile; a new vbd gets none."""
    write_like_libxl(toolstack, OTHER)
    place = Place(xenstored.address, keeper=kept.keeper()).start()
    found = place.vbd(PATH).inherited
    assert found is not None
    kinds = {kind for kind, _ in found}
    new = place.vbd(OTHER).inherited
    place.close()

    assert ({"pidfd", "journal"}, None) == (kinds, new)
    assert not left.has_ended()


def test_a_fault_over_it_concerns_no_other_vbd(
    xenstored: Xenstored, toolstack: Store, kept: Kept, left: Left, lines: io.StringIO
) -> None:
    """If a vbd cannot be taken over because of a bug, its worker is killed, and its descriptors are closed and
    forgotten. After the worker's end the vbd is served from the beginning; scripts wait until then. Other vbds are not
    affected.
    """
    second = Left(kept, OTHER)
    for path in (PATH, OTHER):
        write_like_libxl(toolstack, path)
    place = Place(xenstored.address, keeper=kept.keeper())
    FakeVbd.bugs.add((PATH, "__init__"))
    place.registry.start()
    FakeVbd.bugs.clear()
    served = list(place.registry.vbds)
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    assert [] == replies
    ended = left.has_ended(10), second.has_ended()
    place.settle()
    vbd = place.vbd(PATH)
    inherited, waiting = vbd.inherited, vbd.waiting
    names = sorted(kept.fds)
    place.close()
    second.close()

    assert ([OTHER], (True, False)) == (served, ended)
    assert (None, 1) == (inherited, len(waiting))
    assert [f"vbd-0-6-51712.{what}.{VERSION}" for what in ("journal", "pidfd")] == names
    assert [f"while {PATH} was taken into service"] == [note for bug in place.told for note in bug.__notes__]
    assert 1 == lines.getvalue().count("what an earlier service left cannot be used")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open no further descriptor."""
    first_free = os.dup(0)
    os.close(first_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("of", ["memory", "descriptors"])
def test_a_host_that_is_short_of_something_costs_no_guest_what_was_left(
    xenstored: Xenstored, toolstack: Store, kept: Kept, left: Left, of: str
) -> None:
    """If the host lacks memory or descriptors for a takeover, it is tried again later with all that was left. Meanwhile
    the worker serves, nothing is forgotten, and scripts wait.
    """
    write_like_libxl(toolstack)
    before = sorted(kept.fds)
    place = Place(xenstored.address, keeper=kept.keeper())
    FakeVbd.short = {PATH} if of == "memory" else set()
    place.store.fileno()  # it is made when it is first asked for
    with no_descriptors() if of == "descriptors" else nullcontext():
        place.registry.start()
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    for _ in range(3 if of == "memory" else 0):
        place.clock.time += 1.0
        place.settle()
    served, is_over, after = list(place.registry.vbds), place.registry.has_taken_over, sorted(kept.fds)
    FakeVbd.short = set()
    place.clock.time += 1.0
    place.settle()
    found, waiting, told = place.vbd(PATH).inherited, place.vbd(PATH).waiting, list(replies)
    is_over_now = place.registry.has_taken_over
    place.close()

    assert ([], False, before) == (served, is_over, after)
    assert ({"pidfd", "journal"}, 1, []) == ({kind for kind, _ in found or {}}, len(waiting), told)
    assert is_over_now
    assert not left.has_ended()


def test_a_service_that_is_short_of_something_leaves_it_to_the_next_one(
    xenstored: Xenstored, toolstack: Store, kept: Kept, left: Left
) -> None:
    """If the service ends before such a takeover has succeeded, the waiting script is answered, the keeper still has
    everything, and the worker serves on.
    """
    write_like_libxl(toolstack)
    place = Place(xenstored.address, keeper=kept.keeper())
    FakeVbd.short = {PATH}
    place.registry.start()
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    place.close()

    assert ([Code.GONE], 2) == ([each.code for each in replies], len(kept.fds))
    assert not left.has_ended()


def test_a_former_versions_worker_is_ended_first(
    xenstored: Xenstored, toolstack: Store, kept: Kept, lines: io.StringIO
) -> None:
    """A worker of the former version is ended before its vbd is served. Then the vbd gets all that the worker left, and
    the script that waited.
    """
    left = Left(kept, PATH, version="")
    write_like_libxl(toolstack)
    place = Place(xenstored.address, keeper=kept.keeper())
    place.registry.start()
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    before, is_over = list(place.registry.vbds), place.registry.has_taken_over
    assert left.has_ended(10)
    place.settle()
    is_over_now = place.registry.has_taken_over
    found, waiting, told = place.vbd(PATH).inherited, place.vbd(PATH).waiting, list(replies)
    place.close()
    left.close()

    assert ([], {("journal", 2), ("pidfd", 2), ("open", 3)}) == (before, set(found or {}))
    assert (False, True) == (is_over, is_over_now)
    assert ([], 1) == (told, len(waiting))
    assert "cannot be used" not in lines.getvalue()


def test_a_service_that_stops_meanwhile_leaves_it_to_the_next_one(
    xenstored: Xenstored, toolstack: Store, kept: Kept
) -> None:
    """If the service stops before that worker has ended, the script is answered, and the keeper has everything."""
    left = Left(kept, PATH, version="")
    write_like_libxl(toolstack)
    place = Place(xenstored.address, keeper=kept.keeper())
    place.registry.start()
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    place.close()
    left.close()

    assert [Code.GONE] == [each.code for each in replies]
    assert ["vbd-0-5-51712.journal", "vbd-0-5-51712.open.3", "vbd-0-5-51712.pidfd"] == sorted(kept.fds)


def test_what_is_nobodys_is_let_go(xenstored: Xenstored, kept: Kept) -> None:
    """Inherited descriptors whose names are not those of a vbd of this domain are closed and forgotten."""
    keeper = kept.keeper()
    for name in ("stored", "vbd-1-5-51712.journal", "vbd-0-5.journal"):
        keeper.keep(name, 0)
    assert 3 == len(kept.fds)
    place = Place(xenstored.address, keeper=kept.keeper()).start()
    place.close()

    assert ([], {}) == (FakeVbd.calls, kept.fds)
