"""The automaton of one vbd: a service ends, and the next one inherits its worker."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.supervisor.world import NODE, World, connected, remove
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.backoff import REST_S
from xenbackend.supervisor.vbd.phase import FORCED_LIMIT_S, Phase

S = XenbusState


def test_stopped_service_leaves_the_state_and_the_next_one_serves_on() -> None:
    """A service that stops drains and closes without a write; the next one finds both ends Connected and serves the
    same rings.
    """
    world = connected()
    before = dict(world.node or {})
    world.send(events.Stop())
    world.settle()
    assert (True, before) == (world.is_forgotten, world.node)
    successor = World(node=world.node, theirs=S.CONNECTED)
    successor.settle()
    assert ("4", True) == (successor.state, successor.is_connected)


@pytest.mark.parametrize(("theirs", "goes_on"), [(S.CONNECTED, True), (S.CLOSING, False), (S.UNKNOWN, False)])
def test_only_a_guest_that_stays_waits_for_the_next_service(theirs: XenbusState, *, goes_on: bool) -> None:
    """When a service stops, requests that its worker holds back are left to the next one, unless the guest is closing
    its disk, or it is being taken away: then nobody would do them.
    """
    world = connected()
    if theirs is S.UNKNOWN:
        remove(world)
    world.theirs = theirs
    world.see()
    world.send(events.Stop())

    assert [events.Close(goes_on=goes_on)] == world.inbox


def test_a_guest_that_was_never_seen_is_taken_to_stay() -> None:
    """A service that stops before it has seen xenstore leaves to the next one what its worker holds back."""
    world = connected()
    world.replace_service()
    world.answer()
    world.send(events.Stop())

    assert [events.Close(goes_on=True)] == world.inbox


@pytest.mark.parametrize("dies", ["before the stop", "while it is drained"])
def test_what_a_dead_worker_had_taken_is_done_before_the_service_ends(dies: str) -> None:
    """If a worker dies with requests in flight while its service stops, another worker finishes them and closes, since
    the next service does not know of them. The state stays.
    """
    world = connected()
    if dies == "before the stop":
        world.die("died", is_unfinished=True)
        world.send(events.Stop(is_unfinished=True))
    else:
        world.send(events.Stop(is_unfinished=True))
        world.die("died", is_unfinished=True)
    before = (world.is_forgotten, world.state)
    world.answer()
    world.answer()
    joined = world.joined
    world.answer()

    assert (False, "4") == before
    assert joined is not None
    assert joined.goes_on
    assert (True, "4", False) == (world.is_forgotten, world.state, world.is_running)


def test_a_service_ends_at_last_where_what_was_left_cannot_be_done() -> None:
    """If those requests cannot be finished, the service ends all the same: after one more failure to open, or after as
    many deaths as ever.
    """
    refused, dying = connected(), connected()
    refused.die("died", is_unfinished=True)
    refused.send(events.Stop(is_unfinished=True))
    refused.refuse("there is no such file")
    refused.die("closed", is_unfinished=True)
    dying.send(events.Stop(is_unfinished=True))
    deaths = 0
    while not dying.is_forgotten:
        deaths += 1
        dying.die("died", is_unfinished=True)
        dying.rest()

    assert refused.is_forgotten
    assert 1 + len(REST_S) == deaths


def test_refused_detach_survives_a_restart_of_the_service() -> None:
    """A guest that still uses its disk after online=0 is served again by the next service, still in Closing."""
    world = World({**NODE, "online": "0", "state": "5"}, S.CONNECTED)
    world.settle()

    assert ("5", True) == (world.state, world.is_connected)


def test_removal_is_finished_by_a_service_that_stops() -> None:
    """A service that stops during a removal still writes Closed, because the toolstack waits for it."""
    world = connected()
    remove(world)
    world.settle()
    world.theirs = S.CLOSED
    world.see()
    world.send(events.Stop())
    world.answer()

    assert ("6", True) == (world.state, world.is_forgotten)


def test_a_failed_flush_is_one_to_the_next_service() -> None:
    """A service that stops notes a failed flush in the node. The next one tells its worker, shows it, and removes the
    note at `resume`.
    """
    world = connected()
    world.say(flush_failed="a flush failed")
    world.send(events.Stop())
    world.answer()
    assert world.node is not None
    assert ("4", "a flush failed", True) == (world.state, world.node["flush-failed"], world.is_forgotten)
    successor = World(node=world.node, theirs=S.CONNECTED)
    successor.see()
    successor.answer()
    opened = (successor.lost, dict(successor.node or {}).get("flush-failed"), successor.device.error)
    successor.settle()
    successor.send(events.Resume())

    assert ("a flush failed",) * 3 == opened
    assert ("4", True, "") == (successor.state, successor.is_connected, successor.device.error)
    assert "flush-failed" not in (successor.node or {})


@pytest.mark.parametrize("looks_first", [True, False])
def test_the_next_service_takes_the_worker_over(*, looks_first: bool) -> None:
    """A service that is replaced leaves its worker serving. The next one asks the worker for its standing and goes on
    from there, whether that comes before or after its first look at xenstore.
    """
    world = connected()
    before = dict(world.node or {})
    world.replace_service()
    if looks_first:
        world.see()
    phase = world.device.phase
    world.answer()
    world.see()

    assert Phase.ADOPTING is phase
    assert (Phase.SERVING, True, before) == (world.device.phase, world.is_connected, world.node)
    assert [] == world.inbox
    assert "null:1G" == world.device.layers[0].text


@pytest.mark.parametrize(
    ("theirs", "is_replaced"), [(S.INITIALISED, True), (S.CONNECTED, True), (S.CLOSING, False), (S.CLOSED, False)]
)
def test_rings_that_no_service_has_seen_are_a_successors(theirs: XenbusState, *, is_replaced: bool) -> None:
    """A worker that was taken over hands over to a successor if a frontend offers other rings than those that it
    serves. That is looked for once, when the worker has said that it serves.
    """
    world = connected()
    must_compare = [world.device.sight.must_compare]
    world.replace_service()
    world.see()
    must_compare.append(world.device.sight.must_compare)
    world.answer()
    must_compare.append(world.device.sight.must_compare)
    world.theirs = theirs
    world.send(events.Seen(world.node, theirs, has_moved=True))
    must_compare.append(world.device.sight.must_compare)

    assert [False, False, True, False] == must_compare
    assert is_replaced == (events.Close(hands_over=True) in world.inbox)


def test_nothing_is_decided_before_the_first_look() -> None:
    """While xenstore is away, an inherited worker goes on serving, and one that dies is replaced when xenstore is back.
    Only a service that stops does not wait for xenstore.
    """
    world = connected()
    world.replace_service()
    world.answer()
    assert (Phase.SERVING, []) == (world.device.phase, world.inbox)
    world.say(flush_failed="a flush failed")
    world.die("died")
    assert (False, False) == (world.is_running, world.is_forgotten)
    world.see()
    assert ("4", "a flush failed") == (world.state, world.lost)
    world.settle()
    world.replace_service()
    world.answer()
    world.send(events.Stop())
    world.answer()

    assert ("4", True) == (world.state, world.is_forgotten)


def test_what_an_inherited_worker_says_after_it_told_where_it_stands_counts() -> None:
    """What an inherited worker reports before the service's first look at xenstore, a connection or a failed flush,
    still counts after it.
    """
    world = connected()
    world.replace_service()
    world.inbox.clear()
    world.say(stage=Stage.CONNECTING)
    world.say(stage=Stage.SERVING)
    world.say(flush_failed="a flush failed")
    world.see()

    assert (Phase.SERVING, "a flush failed") == (world.device.phase, world.device.error)
    assert "a flush failed" == (world.node or {})["flush-failed"]


def test_an_inherited_worker_that_cannot_serve_before_the_first_look_is_replaced() -> None:
    """An inherited worker that cannot go on with the rings is replaced, even if the service has not seen yet that a
    guest waits for the disk: the guest is not disconnected.
    """
    world = connected()
    world.replace_service()
    world.inbox.clear()
    world.is_connected = False
    world.say(stage=Stage.CONNECTING)
    world.say(stage=Stage.OPEN, failure="the image is in use", errno=errno.EBUSY)
    world.see()
    world.settle()

    assert ("4", True) == (world.state, world.is_connected)


@pytest.mark.parametrize("state", ["1", "2"])
@pytest.mark.parametrize("has_worker", [True, False])
@pytest.mark.rows("C6")
def test_a_domid_that_is_used_again_while_there_is_no_service_inherits_nothing(state: str, *, has_worker: bool) -> None:
    """A node without the service's own keys belongs to a new guest: it inherits neither worker nor journal."""
    world = connected()
    world.say(flush_failed="a flush failed")
    world.lose_service()
    if not has_worker:
        world.die("died")
    world.node, world.theirs = {**NODE, "state": state}, S.INITIALISING
    world.begin_service()
    world.see()
    assert world.device.sight.is_over
    world.settle()

    assert ("2", "", "", 2) == (world.state, world.device.error, world.lost, world.lives)


def test_an_inherited_worker_that_has_opened_nothing_is_replaced() -> None:
    """An inherited worker that has opened nothing is replaced: its service died before it could order that, or after it
    had failed.
    """
    world = World()
    world.see()
    world.inbox.clear()
    world.say(chain="null:1G")
    world.replace_service()
    world.see()
    world.answer()
    assert [events.Close()] == world.inbox
    world.settle()

    assert ("2", Phase.OPEN, "connected") == (world.state, world.device.phase, world.device.sight.hotplug)


def test_an_inherited_worker_that_does_not_answer_is_killed() -> None:
    """R23: an inherited worker that does not report its standing within ten seconds is killed."""
    world = connected()
    world.replace_service()
    world.see()
    assert 10.0 == world.limit
    world.send(events.Expired())
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_an_inherited_worker_with_another_chain_than_is_wanted_is_replaced() -> None:
    """If the toolstack named another disk while no service ran, the inherited worker is replaced."""
    world = connected()
    world.lose_service()
    assert world.node is not None
    world.node["params"] = "null:2G"
    world.begin_service()
    world.see()
    world.answer()
    assert [events.Close()] == world.inbox
    world.settle()

    assert "null:2G" == world.node["params"] == (world.device.sight.spec and world.device.sight.spec.chain)


def test_a_cdrom_is_not_replaced_because_no_worker_knows_that_it_is_one() -> None:
    """Properties that only the guest is told, such as being a CD-ROM, are no reason to replace an inherited worker."""
    for looks_first in (True, False):
        world = World({**NODE, "device-type": "cdrom", "removable": "1"})
        world.settle()
        world.replace_service()
        if looks_first:
            world.see()
        world.answer()
        world.see()

        assert (Phase.OPEN, []) == (world.device.phase, world.inbox)


def test_a_vbd_that_went_while_there_was_no_service_is_closed() -> None:
    """If a vbd went away while no service ran, its worker is closed within the short limit, and nothing is left."""
    world = connected()
    world.lose_service()
    world.node = None
    world.begin_service()
    world.see()
    world.answer()
    assert ([events.Close()], FORCED_LIMIT_S) == (world.inbox, world.limit)
    world.answer()

    assert (True, False) == (world.is_forgotten, world.is_running)


@pytest.mark.parametrize("meanwhile", [Stage.LEAVING, Stage.OPEN])
def test_a_worker_that_an_earlier_service_has_told_to_close_is_followed_by_another_one(meanwhile: Stage) -> None:
    """An inherited worker that is closing by order of an earlier service breaks no rule, and is followed by another
    one.
    """
    world = connected()
    world.lose_service()
    world.begin_service()
    world.inbox.clear()
    world.say(stage=meanwhile)
    kills = [each for each in world.device.handle(replace(world.standing, stage=Stage.IDLE)) if is_kill(each)]
    world.die("the worker ended unexpectedly with exit status 0")
    world.settle()

    assert [] == kills
    assert ("4", True) == (world.state, world.is_connected)


def is_kill(action: events.Action) -> bool:
    """Return whether a worker is to be killed."""
    return isinstance(action, events.Kill)
