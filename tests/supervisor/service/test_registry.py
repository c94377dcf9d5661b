"""The registry with fake vbds, on a simulated xenstored, in a loop whose clock stands still."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.supervisor.fake_vbd import FakeVbd, Place
from tests.supervisor.helpers import PATH, Kept, write_like_libxl
from xenbackend import counters
from xenbackend.errors import ConfigError, KernelError, StoreError
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.registry import RETRY_S, TURN_S
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.xentop import PERIOD_S, Xentop
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

OTHER = VbdPath("vbd", 0, 6, 51712)


def counted(look: Callable[..., Any], tries: Counter[str]) -> Callable[..., Any]:
    """Return the same function, which also counts the paths that it is called for."""

    def count(path: str, *arguments: Any) -> Any:
        tries[path] += 1
        return look(path, *arguments)

    return count


@pytest.fixture
def place(xenstored: Xenstored) -> Iterator[Place]:
    """A registry without vbds that has not been started."""
    place = Place(xenstored.address)
    yield place
    place.close()


def test_what_is_there_and_what_comes_is_served(place: Place, toolstack: Store) -> None:
    """Each vbd with our script gets one object, whether it was there before the service or comes later; other vbds are
    left alone.
    """
    write_like_libxl(toolstack)
    write_like_libxl(toolstack, VbdPath("vbd", 0, 5, 51728), script="/etc/xen/scripts/block")
    place.start()
    first = place.vbd(PATH)
    write_like_libxl(toolstack, OTHER)
    toolstack.write(f"{PATH.backend}/mode", "r")
    place.settle()

    assert {PATH, OTHER} == set(place.registry.vbds)
    assert place.vbd(PATH) is first
    assert [1, 2] == place.changes
    assert set(first.looks) == {"node"}


def test_an_event_of_a_frontend_is_its_vbds(place: Place, toolstack: Store) -> None:
    """An event of a frontend is recognised by the token of its vbd's watch, and reaches no other vbd."""
    for path in (PATH, OTHER):
        write_like_libxl(toolstack, path)
    place.start()
    place.store.watch(f"{PATH.frontend}/state", f"frontend/{PATH}")
    place.settle()
    for path in (PATH, OTHER):
        place.vbd(path).looks.clear()
    toolstack.write(f"{PATH.frontend}/state", "3")
    place.settle()

    assert (["theirs"], []) == (place.vbd(PATH).looks, place.vbd(OTHER).looks)


@pytest.mark.parametrize("waits", [False, True])
def test_a_place_is_looked_at_again_when_its_vbd_is_over(place: Place, toolstack: Store, *, waits: bool) -> None:
    """If a node is made anew while its former vbd is ending, the new vbd is found, although the event went to the
    former one. Scripts that waited are passed to the new vbd.
    """
    write_like_libxl(toolstack)
    place.start()
    former = place.vbd(PATH)
    toolstack.remove(PATH.backend)
    write_like_libxl(toolstack)
    place.settle()
    replies: list[Answer] = []
    if waits:
        place.registry.hotplug(PATH.backend, replies.append)
    former.end()
    assert PATH not in place.registry.vbds
    place.settle()

    assert place.vbd(PATH) is not former
    assert (waits, []) == (len(place.vbd(PATH).waiting) == 1, replies)
    assert [1, 0, 1] == place.changes


@pytest.mark.parametrize("first", ["script", "event", "end"])
def test_nothing_reaches_a_vbd_that_is_over(place: Place, toolstack: Store, first: str) -> None:
    """In whatever order a vbd's end, its node's event and a script come between two passes of the loop, there is one
    new vbd in the end, and it has the script. Once the script went unanswered, and an orphaned worker kept the image.
    """
    write_like_libxl(toolstack)
    place.start()
    former = place.vbd(PATH)
    toolstack.remove(PATH.backend)
    write_like_libxl(toolstack)
    steps: dict[str, Callable[[], Any]] = {
        "event": place.registry._follow,
        "end": former.end,
        "script": lambda: place.registry.hotplug(PATH.backend, lambda _: None),
    }
    place.store.read("domid")  # now the events have come
    for step in (first, *(each for each in steps if each != first)):
        steps[step]()
    made = [path for path, method in FakeVbd.calls if method == "__init__"]
    place.settle()

    assert 1 == len(place.vbd(PATH).waiting)
    assert place.vbd(PATH) is not former
    assert len(made) <= 2 == [method for _, method in FakeVbd.calls].count("__init__")
    assert [] == place.told


def test_others_are_heard_while_many_places_are_looked_at(place: Place, toolstack: Store) -> None:
    """In each pass of the loop, places are looked at for a short time only. A script waits until its own place has been
    looked at, a question about disks until all places found at the start have been.
    """
    make, seen, asked, replies = place.registry._make, list[int](), list[int](), list[Answer]()
    paths = [VbdPath("vbd", 0, domid, 51712) for domid in range(1, 8)]
    for path in paths:
        write_like_libxl(toolstack, path)

    def slow(path: VbdPath, *more: Any) -> Any:
        place.clock.time += 0.6 * TURN_S
        return make(path, *more)

    def look() -> bool:
        seen.append(len(place.registry.vbds))
        if seen == [2]:  # of this pass; the hook of the registry came first
            place.registry.hotplug(paths[0].backend, replies.append)
            toolstack.remove(paths[0].backend)
            write_like_libxl(toolstack, paths[0])
            place.vbd(paths[0]).end()
        return False

    place.registry._make = slow
    place.registry.when_found(lambda: asked.append(len(place.registry.vbds)))
    place.registry.start()
    place.loop.before_sleep(look)
    place.settle()
    waiting = place.vbd(paths[0]).waiting
    place.settle(1)
    told = list(asked)
    place.registry.when_found(lambda: asked.append(0))

    assert 2 == seen[0], "as many as are begun within a turn"
    assert [7] != seen[1:2], "the others in several passes"
    assert (1, []) == (len(waiting), replies)
    assert ([7], [7, 0]) == (told, asked)


@pytest.mark.parametrize("end", ["stop", "loss"])
def test_nobody_waits_for_what_will_not_be_found(place: Place, end: str) -> None:
    """When the service stops or xenstore is away, waiting questions are answered in order by what is known, even after
    one of them has raised an exception.
    """
    asked: list[str] = []
    bug = ValueError("a bug of ours")

    def fail() -> None:
        asked.append("bug")
        raise bug

    place.registry.when_found(fail)
    place.settle(0.04)
    place.registry.when_found(lambda: asked.append("before"))
    assert [] == asked
    if end == "stop":
        place.registry.stop()
    else:
        place.store.disconnect()
    place.registry.when_found(lambda: asked.append("after"))
    place.settle(1)

    assert (["bug", "before", "after"], [bug]) == (asked, place.told)


def test_a_script_is_told_why_nobody_serves_its_vbd(place: Place, toolstack: Store) -> None:
    """A script with an invalid path is refused; one whose vbd has another script, or is gone, is answered with the
    reason.
    """
    place.start()
    write_like_libxl(toolstack, script="/etc/xen/scripts/block")
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    toolstack.write(f"{PATH.backend}/script", "block-xenbackend")
    place.registry.hotplug(PATH.backend, replies.append)
    toolstack.remove(PATH.backend)
    place.vbd(PATH).end()
    place.settle()

    assert [Code.GONE, Code.GONE] == [each.code for each in replies]
    assert all("is not served: it is gone, or its key script does not name one of" in each.sentence for each in replies)
    with pytest.raises(ConfigError, match="is not the directory of a vbd of domain 0"):
        place.registry.hotplug(f"{PATH.backend}/state", replies.append)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_service_that_stops_serves_nobody_new(place: Place, toolstack: Store, *, leaves: bool) -> None:
    """When the service stops, each vbd is told how it ends, and new nodes are left to the next service. Scripts that
    wait, and those that still come, are told that the service is stopping, but are not answered if there will be
    another one, which they can ask.
    """
    write_like_libxl(toolstack)
    write_like_libxl(toolstack, OTHER)
    place.start()
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)
    place.registry.stop(leaves=leaves)
    stopped = [place.vbd(path).stopped for path in (PATH, OTHER)]
    for path in (PATH, OTHER):
        place.vbd(path).end()
    place.settle()
    place.registry.hotplug(PATH.backend, replies.append)

    assert ([[leaves], [leaves]], {}) == (stopped, dict(place.registry.vbds))
    assert ([] if leaves else 2 * [(Code.GONE, "the service is stopping")]) == [
        (each.code, each.sentence) for each in replies
    ]


@pytest.mark.parametrize("method", ["look_soon", "doubt", "hotplug", "counters_page", "stop"])
@pytest.mark.rows("R24")
def test_a_bug_stays_with_its_vbd(xenstored: Xenstored, toolstack: Store, tmp_path: Path, method: str) -> None:
    """An exception in a call to one vbd is reported with the vbd's name, and all other vbds are still called."""
    paths = [VbdPath("vbd3", 0, 5, 51712 + 16 * number) for number in range(3)]
    (tmp_path / "shm").mkdir()
    place = Place(xenstored.address, xentop=Xentop(tmp_path / "xentop", tmp_path / "shm"))
    for path in paths:
        write_like_libxl(toolstack, path)
    place.start()
    for path in paths:
        place.vbd(path).page = memoryview(bytes(counters.SIZE))
    FakeVbd.calls.clear()
    FakeVbd.bugs.add((paths[1], method))
    toolstack.remove("/local/domain/0/backend/vbd3/5")
    for path in paths:
        place.registry.hotplug(path.backend, lambda _: None)
    place.settle(PERIOD_S)
    xenstored.stop()
    xenstored.start()
    toolstack.reconnect()
    place.settle(1)
    place.settle(1)
    place.registry.stop()
    called = {path for path, each in FakeVbd.calls if each == method}
    FakeVbd.bugs.clear()
    place.close()

    assert set(paths) == called
    assert place.told
    assert all(f"a bug of {paths[1]}" == str(each) for each in place.told)
    assert {f"while {paths[1]} was handled"} == {note for each in place.told for note in each.__notes__}


def test_a_bug_over_a_script_is_its_answer(place: Place, toolstack: Store) -> None:
    """If a vbd raises an exception over a script, the script gets that as its answer."""
    write_like_libxl(toolstack)
    place.start()
    FakeVbd.bugs.add((PATH, "hotplug"))
    replies: list[Answer] = []
    place.registry.hotplug(PATH.backend, replies.append)

    assert [Code.BUG] == [each.code for each in replies]


def test_a_vbd_that_cannot_stop_does_not_keep_the_service(place: Place, toolstack: Store) -> None:
    """If a vbd raises an exception when it is stopped, the service ends without it."""
    write_like_libxl(toolstack)
    place.start()
    FakeVbd.bugs.add((PATH, "stop"))
    place.registry.stop()

    assert {} == dict(place.registry.vbds)


def test_what_cannot_be_taken_into_service_is_tried_again(
    place: Place, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vbd that cannot be made, for lack of descriptors or because of a bug, is tried again after a while. Its script
    is told why, and other vbds are served.
    """
    write_like_libxl(toolstack)
    write_like_libxl(toolstack, OTHER)
    former = FakeVbd.__init__
    problems: list[Exception] = [KernelError("make a journal", 24), ValueError("a bug")]

    def fail(vbd: FakeVbd, path: VbdPath, *arguments: Any) -> None:
        if path == PATH and problems:
            raise problems.pop(0)
        former(vbd, path, *arguments)

    monkeypatch.setattr(FakeVbd, "__init__", fail)
    place.start()
    served = [set(place.registry.vbds)]
    place.settle(RETRY_S)
    replies: list[Answer] = []
    monkeypatch.setattr(place.registry, "_consider", lambda _: None)
    place.registry.hotplug(PATH.backend, replies.append)
    monkeypatch.undo()
    served.append(set(place.registry.vbds))
    place.settle(RETRY_S)
    served.append(set(place.registry.vbds))

    assert [{OTHER}, {OTHER}, {PATH, OTHER}] == served
    assert ["a bug"] == [str(each) for each in place.told]
    assert ["see its log: ValueError: a bug" in each.sentence for each in replies] == [True]


def test_a_watch_that_was_refused_with_the_connection_is_set_later(
    xenstored: Xenstored, toolstack: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If xenstored refuses the watch that finds new disks when the connection comes back, the service connects again
    until it is set.
    """
    place = Place(xenstored.address)
    try:
        place.start()
        watch, refusals = place.store.watch, [StoreError("xenstore: watch: No space left")] * 2

        def refuse(path: str, token: str) -> None:
            if refusals:
                raise refusals.pop()
            watch(path, token)

        monkeypatch.setattr(place.store, "watch", refuse)
        place.store._forget_watch("/local/domain/0/backend/vbd", "vbds")  # as `reconnect` does with a refused one
        place.store.disconnect()
        for _ in range(8):
            place.settle(RETRY_S)
        write_like_libxl(toolstack)
        place.settle()

        assert ([], {PATH}) == (refusals, set(place.registry.vbds))
    finally:
        place.close()


def test_what_xenstore_refuses_of_one_place_keeps_no_other(
    xenstored: Xenstored, toolstack: Store, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a vbd's node or a domain's directory may not be read, only that vbd or domain is affected: the connection
    stays, other places are looked at, it is logged once, a script gets the error, and it is tried again every second.
    """
    refused, hidden, other = (VbdPath("vbd", 2, domid, 51712) for domid in (5, 6, 7))
    sealed = {f"{refused.backend}/script": refused, "/local/domain/2/backend/vbd/6": hidden}
    address = xenstored.add_domain_socket(2)
    toolstack.mkdir("/local/domain/2/data")
    toolstack.set_permissions("/local/domain/2/data", ["n2"])
    for path in (refused, hidden, other):
        write_like_libxl(toolstack, path)
    for node in sealed:
        toolstack.set_permissions(node, ["n0"])
    place = Place(address)
    tries = Counter[str]()
    for name in ("read_many", "directory"):
        monkeypatch.setattr(place.store, name, counted(getattr(place.store, name), tries))
    try:
        place.start()
        tries.clear()
        for _ in range(5):
            place.settle(RETRY_S)
        assert {refused.backend: 5, "/local/domain/2/backend/vbd/6": 5} == tries
        served, doubts = set(place.registry.vbds), place.vbd(other).doubted
        with pytest.raises(StoreError, match="/5/51712/script: Permission denied"):
            place.registry.hotplug(refused.backend, lambda _: None)
        for node in sealed:
            toolstack.set_permissions(node, ["n2"])
        place.settle(RETRY_S)
        place.settle()

        assert ({other}, 0, {refused, hidden, other}) == (served, doubts, set(place.registry.vbds))
        assert [True, True] == [1 == lines.getvalue().count(f"{node}: Permission denied") for node in sealed]
        assert "xenstore is gone" not in lines.getvalue()
        assert [] == place.told
    finally:
        place.close()


def test_a_connection_that_is_lost_is_no_fault_of_a_place(
    place: Place, toolstack: Store, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection is lost while a place is looked at, that is the connection's loss alone, and logged as such."""
    really_read = place.store.read_many

    def lose(*arguments: Any) -> dict[str, str]:
        monkeypatch.undo()
        place.store.disconnect()
        return really_read(*arguments)

    for path in (PATH, OTHER):
        write_like_libxl(toolstack, path)
    monkeypatch.setattr(place.store, "read_many", lose)
    place.start()
    said = lines.getvalue().splitlines()
    place.settle(10)
    place.settle()

    assert ["the connection to xenstore is lost" in line for line in said] == [True], said
    assert {PATH, OTHER} == set(place.registry.vbds)


def test_xenstore_that_goes_away_is_found_again(
    place: Place, xenstored: Xenstored, toolstack: Store, lines: io.StringIO
) -> None:
    """After xenstore has come back, every vbd looks at everything, and new vbds are found; the loss is logged once."""
    write_like_libxl(toolstack)
    place.start()
    xenstored.stop()
    with pytest.raises(Exception, match="connection lost"):
        place.store.read("domid")
    for _ in range(10):
        place.settle(10)
    said = lines.getvalue()
    xenstored.start()
    toolstack.reconnect()
    write_like_libxl(toolstack, OTHER)
    place.settle(10)
    place.settle()

    assert (1, {PATH, OTHER}) == (place.vbd(PATH).doubted, set(place.registry.vbds))
    assert 1 == said.count("the connection to xenstore is lost")
    assert "connection lost: " in said
    assert [] == place.told


def test_a_domain_that_goes_is_looked_at_alone(place: Place, toolstack: Store) -> None:
    """An event of a domain's directory makes the registry look at that domain's vbds of that kind only, including new
    ones and those that are gone.
    """
    gone, new = VbdPath("vbd", 0, 5, 51728), VbdPath("vbd", 0, 5, 51744)
    served = [PATH, gone, VbdPath("vbd3", 0, 5, 51712), OTHER]
    for path in served:
        write_like_libxl(toolstack, path)
    place.start()
    for path in served:
        place.vbd(path).looks.clear()
    toolstack.remove(gone.backend)
    write_like_libxl(toolstack, new)
    place.store.read("domid")
    place.store.events()
    place.registry._sort([("/local/domain/0/backend/vbd/5", "vbds")])
    place.settle()

    assert {*served, new} == set(place.registry.vbds)
    assert {PATH, gone} == {path for path in served if place.vbd(path).looks}


def test_a_disk_is_found_by_each_of_its_names(place: Place, toolstack: Store) -> None:
    """A disk is found by domain and device, by the guest's name, and by its path in xenstore. The error for an unknown
    disk lists those that exist.
    """
    blktap = VbdPath("vbd3", 0, 6, 51728)
    for path in (PATH, blktap):
        write_like_libxl(toolstack, path)
    toolstack.write("/local/domain/5/name", "web")
    toolstack.write("/local/domain/6/name", "db-1")
    place.start()
    names = {"5/xvda": PATH, "web/xvda": PATH, "vbd/5/51712": PATH, "vbd3/6/51728": blktap, "db-1/xvdb": blktap,
             "6/51728": blktap, PATH.backend: PATH}  # fmt: skip

    assert names == {name: place.registry.find(name).path for name in names}
    for name in ("5/xvdb", "vbd3/5/51712", "mail/xvda", "7/xvda"):
        with pytest.raises(ConfigError, match=f"no disk '{name}' in service; there are 5/xvda, 6/xvdb"):
            place.registry.find(name)
    toolstack.write("/local/domain/6/name", "web")
    with pytest.raises(ConfigError, match="2 guests are called web; write the domain's number"):
        place.registry.find("web/xvda")
    with pytest.raises(ConfigError, match="is not a disk"):
        place.registry.find("xvda")


def test_xentop_is_shown_the_counters(xenstored: Xenstored, toolstack: Store, tmp_path: Path) -> None:
    """A vbd of kind vbd3 has a record for xentop as soon as it has counters, and for as long as it is served."""
    path = VbdPath("vbd3", 0, 5, 51712)
    (tmp_path / "shm").mkdir()
    record = tmp_path / "shm" / f"td3-{os.getpid()}" / "vbd-5-51712"
    write_like_libxl(toolstack, path)
    place = Place(xenstored.address, xentop=Xentop(tmp_path / "xentop", tmp_path / "shm")).start()
    seen = [record.exists()]
    place.vbd(path).page = memoryview(bytes(counters.SIZE))
    place.settle(PERIOD_S)
    seen.append(record.exists())
    toolstack.remove(path.backend)
    place.vbd(path).end()
    place.settle(PERIOD_S)
    seen.append(record.exists())
    place.close()

    assert [False, True, False] == seen
    assert [] == list((tmp_path / "shm").iterdir())


class Counted(dict[Any, Any]):
    """A dictionary that counts how many of its entries were iterated over."""

    seen = 0

    def __iter__(self) -> Iterator[Any]:
        for each in super().__iter__():
            Counted.seen += 1
            yield each

    def keys(self) -> Any:
        """Return the keys, counted."""
        return list(self)

    def values(self) -> Any:
        """Return the values, counted."""
        return [self[each] for each in self]

    def items(self) -> Any:
        """Return the items, counted."""
        return [(each, self[each]) for each in self]


def test_what_happens_to_one_disk_costs_the_same_however_many_there_are(place: Place, toolstack: Store) -> None:
    """If one of 256 disks changes, its frontend changes, a script or a question comes for it, or it goes away, the
    other disks are neither called nor iterated over.
    """
    paths = [VbdPath("vbd", 0, 1 + number // 4, 51712 + 16 * (number % 4)) for number in range(256)]
    for path in paths:
        write_like_libxl(toolstack, path)
    place.start()
    assert set(paths) == set(place.registry.vbds)
    one = paths[100]
    place.store.watch(f"{one.frontend}/state", f"frontend/{one}")
    place.settle()
    vbds = place.registry.vbds
    vbds._by_path, vbds._by_token = Counted(vbds._by_path), Counted(vbds._by_token)
    vbds._by_domain = Counted(vbds._by_domain)
    place.store._watches = Counted(place.store._watches)
    Counted.seen = 0
    FakeVbd.calls.clear()
    asked = len(place.told)
    before = place.store._request
    toolstack.write(f"{one.frontend}/state", "4")
    toolstack.write(f"{one.backend}/mode", "r")
    place.settle()
    place.registry.find(f"{one.frontend_domid}/xvda")
    place.registry.hotplug(one.backend, lambda _: None)
    place.settle()
    toolstack.remove(one.backend)
    place.settle()
    place.vbd(one).end()
    place.settle()

    assert {one} == {path for path, _ in FakeVbd.calls}
    assert {"look_soon", "hotplug", "end"} == {method for _, method in FakeVbd.calls}
    assert (0, asked) == (Counted.seen, len(place.told))
    assert place.store._request - before < 12  # requests to xenstore, with those of `settle`


def test_settings_that_leave_a_kind_out_do_so_for_new_disks(xenstored: Xenstored, toolstack: Store, kept: Kept) -> None:
    """A disk of a kind that the settings leave out is served to its end if an earlier service has begun with it."""
    path = VbdPath("vbd3", 0, 5, 51712)
    write_like_libxl(toolstack, path)
    kept.keeper().keep("vbd3-0-5-51712.journal", os.memfd_create("x"))
    place = Place(xenstored.address, Settings(kinds=["vbd"]), keeper=kept.keeper()).start()
    looks = place.vbd(path).looks
    place.vbd(path).end()
    place.settle()
    place.close()

    assert ({}, {"node"}) == (dict(place.registry.vbds), set(looks))
