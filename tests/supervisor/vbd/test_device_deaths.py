"""The automaton of one vbd: the death of a worker, and its successor."""

from __future__ import annotations

import pytest

from tests.supervisor.world import IDLE, NODE, World, connected, remove
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.phase import FORCED_LIMIT_S, LIMIT_S, Phase

S = XenbusState


@pytest.mark.parametrize("theirs", [S.INITIALISED, S.CONNECTED, S.CLOSING])
def test_a_dead_worker_is_followed_by_another_one(theirs: S) -> None:
    """If a worker dies, a successor serves the same rings, whichever state the guest is in. The reason is shown until
    it does.
    """
    world = connected()
    world.theirs = theirs
    world.settle()
    before = world.state
    world.die("the worker was ended by SIGKILL")
    meanwhile = (world.state, world.device.error, world.inbox[:])
    world.settle()

    assert (before, "the worker was ended by SIGKILL", ["open"]) == meanwhile
    assert (before, True, "") == (world.state, world.is_connected, world.device.error)
    assert world.joined is not None
    assert world.joined.goes_on


def test_workers_that_die_in_vain_come_later_and_later() -> None:
    """The first successor comes at once, the next ones after longer and longer rests, and after the last death none.
    The guest then waits in Connected, and the error names the command that helps.
    """
    world = connected()
    rests = []
    for _ in range(7):
        world.die("died")
        rests.append(world.limit if world.device.phase is Phase.RESTING else None)
        world.rest()
        world.answer()
    world.settle()

    assert [None, 0.1, 0.3, 1.0, 2.0, 5.0, None] == rests
    assert "hotplug-error" not in (world.node or {})
    assert ("4", Phase.NONE) == (world.state, world.device.phase)
    assert "died, 7 in a row; start another one with `xenbackend resume`" == world.device.error
    world.send(events.Resume())
    world.settle()
    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_a_worker_that_did_something_for_the_guest_did_not_die_in_vain() -> None:
    """As long as the guest makes progress, each dead worker is replaced at once, however many die."""
    world = connected()
    for _ in range(20):
        world.die("died", has_progressed=True)
        assert Phase.OPENING is world.device.phase
        world.answer()
        world.answer()

    assert (True, "") == (world.is_connected, world.device.error)


def test_a_frontend_that_begins_anew_gets_another_worker_after_all() -> None:
    """A guest that was given up is served again when its driver starts anew, even by a service that never opened the
    disk.
    """
    for world in (connected(), World(node=connected().node, theirs=S.CONNECTED)):
        world.see()
        for _ in range(7):
            world.die("died")
            world.rest()
        assert world.device.phase is Phase.NONE
        world.theirs = S.INITIALISING
        world.settle()

        assert ("2", Phase.OPEN, "") == (world.state, world.device.phase, world.device.error)


def test_workers_that_die_before_there_is_a_guest_close_the_vbd() -> None:
    """If no guest has connected yet, the last death puts the vbd into Closed with its error, until it is attached
    again.
    """
    world = World()
    world.settle()
    for _ in range(7):
        world.die("died")
        world.rest()
        world.answer()
    world.settle()

    assert world.node is not None
    assert ("6", "error") == (world.state, world.node["hotplug-status"])
    assert "died, 7 in a row; start another one with `xenbackend resume`" == world.device.error
    world.node = dict(NODE)
    world.settle()
    assert ("2", True, "") == (world.state, world.is_running, world.device.error)


def test_what_cannot_be_opened_for_a_guest_that_waits_is_tried_for_ever() -> None:
    """If successors cannot open the image (because a server is down), more of them follow, at longer and longer
    intervals, without end. The guest stays Connected and is served when the image is back.
    """
    world = connected()
    world.cannot = "no such file"
    world.die("died", has_progressed=True)
    for _ in range(5):
        world.settle()
        assert ("4", "no such file") == (world.state, world.device.error)
    world.cannot = ""
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_rings_that_a_successor_cannot_map_are_tried_again() -> None:
    """If a successor cannot map the rings, for lack of memory say, the next one tries again, and the guest keeps its
    disk.
    """
    world = connected()
    world.die("died", has_progressed=True)
    world.answer()
    world.refuse("map a grant: out of memory")
    meanwhile = (world.state, world.device.error)
    world.settle()

    assert ("4", "map a grant: out of memory") == meanwhile
    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_failures_to_open_do_not_count_as_deaths() -> None:
    """After an image was away for long, a successor may still die as often as any other."""
    world = connected()
    world.cannot = "no such file"
    world.die("died", has_progressed=True)
    world.settle()
    world.settle()
    world.cannot = ""
    world.settle()
    world.die("died again")

    assert (Phase.RESTING, 0.1) == (world.device.phase, world.limit)


def test_an_image_that_comes_and_goes_is_looked_for_at_once_each_time() -> None:
    """Failures to open before the disk was last served do not lengthen later pauses."""
    world = connected()
    for _ in range(2):
        world.cannot = "no such file"
        world.die("died", has_progressed=True)
        world.answer()
        world.answer()
        assert (["open"], Phase.OPENING) == (world.inbox, world.device.phase)  # not after a rest
        world.answer()
        world.answer()
        assert (Phase.RESTING, 0.1) == (world.device.phase, world.limit)
        world.cannot = ""
        world.settle()


def test_what_a_worker_suffered_from_ends_with_it() -> None:
    """A worker's trouble is not shown after its death; its layers are, since the successor opens them again."""
    world = connected()
    world.say(trouble="write: no room")
    world.die("died", has_progressed=True)
    assert "died" == world.device.error
    world.answer()
    world.answer()
    world.die("died", has_progressed=True)

    assert ("died", ["null:1G"]) == (world.device.error, [each.text for each in world.device.layers])


def test_a_removal_is_finished_without_another_look() -> None:
    """If a worker dies during the removal of its vbd, Closed is written at once, since no watch would fire any more."""
    world = connected()
    remove(world)
    world.theirs = S.CLOSED
    world.see()
    world.die("died")

    assert ("6", Phase.NONE) == (world.state, world.device.phase)


def test_another_process_takes_over() -> None:
    """A worker that is to be replaced hands over in order, and the next one serves the same rings; this does not count
    as a death.
    """
    world = connected()
    world.send(events.Replace())
    told = (world.device.phase, world.inbox[:])
    world.answer()
    shown = world.device.error
    world.settle()

    assert (Phase.RETIRING, [events.Close(hands_over=True)]) == told
    assert "" == shown
    assert ("4", True) == (world.state, world.is_connected)
    assert world.joined is not None
    assert world.joined.goes_on


def test_a_worker_that_does_not_hand_over_is_killed() -> None:
    """A worker that does not hand over in time is killed, and its successor goes on by the journal. If the node is
    gone, the limit is shorter.
    """
    world = connected()
    world.send(events.Replace())
    world.send(events.Expired())
    world.settle()
    assert ("4", True) == (world.state, world.is_connected)
    world.send(events.Replace())
    world.node = None
    world.see()

    assert FORCED_LIMIT_S == world.limit


def test_nobody_is_replaced_who_is_not_there() -> None:
    """An order to replace the worker of a vbd that has none does not affect the next worker."""
    world = connected()
    world.die("died")
    world.die("died")
    assert world.device.phase is Phase.RESTING
    world.send(events.Replace())
    world.settle()

    assert Phase.SERVING is world.device.phase


def test_a_failed_flush_stays_one_when_its_worker_dies() -> None:
    """A successor is told of a failed flush until `resume`, which counts even while there is no worker."""
    world = connected()
    world.say(flush_failed="a flush failed")
    world.die("died")
    assert "a flush failed" == world.lost
    world.send(IDLE)  # it has not looked into the journal yet
    assert "a flush failed" == world.device.error
    for _ in range(6):
        world.die("died")
        world.rest()
    assert world.device.phase is Phase.NONE
    world.send(events.Resume())
    world.settle()

    assert ("", "") == (world.lost, world.device.error)
    assert "flush-failed" not in (world.node or {})


def test_a_chain_that_a_worker_put_in_before_it_died_is_gone_on_with() -> None:
    """If a worker dies after an exchange, its successor opens the new chain, whatever the node says: what the guest
    wrote to it must not be lost.
    """
    world = connected()
    world.device.handle(events.Exchanged(("null:1G",), "null:2G"))
    starts = [
        each
        for each in world.device.handle(events.Ended("died", has_progressed=True))
        if isinstance(each, events.Start)
    ]

    assert ["null:2G"] == [each.spec.chain for each in starts]


def test_worker_that_takes_too_long_is_killed() -> None:
    """R23: a worker that does not answer in time is killed, and another one follows."""
    world = connected()
    world.theirs = S.INITIALISING
    world.see()
    assert [events.Leave()] == world.inbox
    world.send(events.Expired())
    world.answer()
    assert "disconnecting for too long" in world.device.error
    world.settle()

    assert ("2", False, Phase.OPEN) == (world.state, world.is_connected, world.device.phase)


def test_a_worker_that_breaks_the_protocol_is_replaced_like_one_that_died() -> None:
    """A worker that breaks the protocol is replaced, and the guest notices only a delay; a disk whose workers do so
    again and again is given up.
    """
    world = connected()
    for _ in range(6):
        world.lie(Stage.IDLE)
        assert ["the worker was killed: it says that it is idle, while it was serving"] == world.inbox
        world.settle()
        assert ("4", True, "") == (world.state, world.is_connected, world.device.error)
    world.lie(Stage.IDLE)
    world.settle()

    assert ("4", False) == (world.state, world.is_running)
    assert "it says that it is idle, while it was serving, 7 in a row" in world.device.error


def test_storage_that_does_not_answer_costs_no_worker() -> None:
    """While an opener waits for storage, that is shown, and the limit for opening does not run; afterwards the worker
    has all of it.
    """
    world = connected()
    world.die("the worker was ended by SIGKILL")
    world.send(events.Waits("/remote/a.img"))
    world.send(events.Expired())
    assert (Phase.OPENING, "storage", ["open"]) == (world.device.phase, world.device.reason, world.inbox)
    assert "/remote/a.img cannot be opened: its storage does not answer" in world.device.error
    world.limit = None
    world.send(events.Waits(""))
    assert (LIMIT_S[Phase.OPENING], "interrupted") == (world.limit, world.device.reason)
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


@pytest.mark.parametrize("comes_late", [False, True], ids=["known before", "known later"])
def test_a_worker_that_waits_for_storage_is_not_asked_to_close(comes_late: bool) -> None:
    """A worker that waits for storage is killed instead of being told to close, so that a detach is quick: it would not
    hear, and has nothing to lose.
    """
    world = connected()
    world.die("died")
    if not comes_late:
        world.send(events.Waits("/a"))
    world.node = None
    world.see()
    if comes_late:
        assert [events.Close()] == world.inbox[-1:]
        world.send(events.Waits("/a"))

    assert Phase.CLOSING is world.device.phase
    assert ["the worker was killed: it was no longer needed, and was waiting for a file or a key"] == world.inbox


def test_each_successor_has_its_own_time_to_open() -> None:
    """A worker that is started at once, because its predecessor died while it opened the chain, has a limit of its own,
    which begins with it.
    """
    world = connected()
    world.die("died", has_progressed=True)
    world.limit = None
    world.die("died again", has_progressed=True)

    assert (["open"], LIMIT_S[Phase.OPENING]) == (world.inbox, world.limit)


def test_workers_that_cannot_open_in_time_are_followed_for_ever() -> None:
    """Workers that are killed because opening took too long are replaced without end: the storage may be slow, and the
    disk is not given up.
    """
    world = connected()
    world.die("died")
    for _ in range(20):
        world.inbox.clear()
        world.send(events.Expired())
        world.die("the worker was killed: it was opening for too long")
        assert "interrupted" == world.device.reason
        world.rest()
        assert (["open"], LIMIT_S[Phase.OPENING]) == (world.inbox, world.limit)
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_who_was_not_started_because_others_hang_is_started_later() -> None:
    """A worker that was not started because others hang in the same storage is started later; that is tried without
    end, and does not count as a death.
    """
    world = connected()
    world.die("died")
    for _ in range(20):
        world.inbox.clear()
        world.die("its storage has not answered 2 times", has_waited=True)
        assert "its storage has not answered 2 times" == world.device.error
        world.rest()
        assert ["open"] == world.inbox
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_a_key_that_is_made_costs_no_worker() -> None:
    """While an opener derives a key, or waits for its turn to do so, that is shown, and the limit for opening does not
    run.
    """
    world = connected()
    world.die("the worker was ended by SIGKILL")
    world.send(events.Waits("/etc/key", makes_key=True))
    world.send(events.Expired())
    assert (Phase.OPENING, ["open"]) == (world.device.phase, world.inbox)
    assert "the key is being derived from /etc/key, which takes seconds, one disk at a time" in world.device.error
    assert "key" == world.device.reason
    world.send(events.Waits("", makes_key=True))
    assert "key" != world.device.reason
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)
