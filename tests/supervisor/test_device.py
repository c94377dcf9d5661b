"""The automaton of one vbd: its life in the cases that guests and toolstacks make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import LAYER, NODE, PATH, World, connected, remove
from xenbackend import control
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor import events
from xenbackend.supervisor.device import FORCED_LIMIT_S, Device, Phase
from xenbackend.supervisor.paths import VbdPath

S = XenbusState


def test_birth_to_connected() -> None:
    """A new vbd goes to InitWait at once, is opened, and is Connected once the frontend's rings are served."""
    world = World()
    world.see()
    offered = dict(world.node or {})
    world.answer()
    opened = dict(world.node or {})
    world.theirs = S.INITIALISED
    world.see()

    assert ("2", "8") == (offered["state"], str(len(offered) - len(NODE) + 4))
    assert "hotplug-status" not in offered
    assert ("2", "connected", "2097152") == (opened["state"], opened["hotplug-status"], opened["sectors"])
    assert "2" == world.state
    world.answer()
    assert "4" == world.state


def test_frontend_that_is_faster_than_the_chain_waits() -> None:
    """A frontend in Initialised is not connected while the chain is still being opened."""
    world = World(theirs=S.INITIALISED)
    world.see()
    world.see()

    assert ["open"] == world.inbox
    assert "2" == world.state


def test_guest_closes_and_comes_back() -> None:
    """After the frontend's Closing and Closed the vbd is Closed with its chain open; Initialising offers it again."""
    world = connected()
    world.theirs = S.CLOSING
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSED
    world.settle()
    assert ("6", False, Phase.OPEN) == (world.state, world.is_connected, world.device.phase)
    world.theirs = S.INITIALISING
    world.settle()
    assert "2" == world.state
    world.theirs = S.INITIALISED
    world.settle()
    assert "4" == world.state


def test_guest_that_comes_back_between_two_looks_is_served() -> None:
    """A frontend that is Initialised again when we look next, after its Closed, is served: GRUB hands a disk over so,
    and whoever takes it over waits for no InitWait.
    """
    world = connected()
    world.theirs = S.CLOSED
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("4", True) == (world.state, world.is_connected)


def test_guest_that_comes_back_between_two_looks_gets_another_worker() -> None:
    """Where the former worker has died, too."""
    world = connected()
    world.die("the worker was ended by SIGKILL")
    world.theirs = S.CLOSED
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("4", "") == (world.state, world.device.error)


def test_frontend_that_starts_anew_is_disconnected_first() -> None:
    """A frontend in Initialising while we are Connected (kexec) is offered the vbd once its old rings are let go."""
    world = connected()
    world.theirs = S.INITIALISING
    world.see()
    assert ("4", [control.Disconnect()]) == (world.state, world.inbox)
    world.answer()
    assert "2" == world.state


@pytest.mark.parametrize("theirs", [S.UNKNOWN, S.INITIALISING, S.INITIALISED, S.CLOSED])
def test_removal_of_a_vbd_that_never_connected(theirs: S) -> None:
    """online=0 closes the chain and ends in Closed, whether or not a frontend ever came."""
    world = World()
    world.see()
    world.theirs = theirs
    remove(world)
    world.settle()

    assert ("6", False) == (world.state, world.is_running)


def test_removal_waits_for_a_connected_frontend() -> None:
    """A connected frontend is served on after online=0 until it has closed, and Closed comes after the worker's end."""
    world = connected()
    remove(world)
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSING
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSED
    world.see()
    assert ("5", [control.Close()]) == (world.state, world.inbox)
    world.answer()
    assert "6" == world.state


def test_forced_removal_does_not_wait_for_the_guest() -> None:
    """R23: once the frontend's directory is gone, a vbd that is to go away does so whatever the guest did."""
    world = connected()
    remove(world)
    world.theirs = S.UNKNOWN
    world.settle()

    assert ("6", False) == (world.state, world.is_running)


def test_vanished_node_is_a_forced_close() -> None:
    """A backend directory that is gone closes the vbd within a short limit and writes nothing."""
    world = connected()
    world.node = None
    world.see()
    assert ([control.Close()], FORCED_LIMIT_S) == (world.inbox, world.limit)
    world.send(events.Expired())
    world.answer()
    assert (True, None) == (world.is_forgotten, world.node)


def test_single_missing_state_is_a_forced_close() -> None:
    """A directory without a state is nobody's vbd any more: the worker is closed and no key is written."""
    world = connected()
    assert world.node is not None
    del world.node["state"]
    before = dict(world.node)
    world.settle()

    assert (False, before) == (world.is_running, world.node)


def test_chain_that_cannot_be_opened_is_reported_and_the_state_stays() -> None:
    """A failed open is told in hotplug-error and hotplug-status, in InitWait, and is not tried again by itself."""
    world = World()
    world.see()
    world.inbox.clear()
    world.send(control.Failed("aio: /img: there is no such file", 2))
    world.answer()
    world.theirs = S.INITIALISED
    world.settle()

    assert world.node is not None
    assert ("2", "error") == (world.node["state"], world.node["hotplug-status"])
    assert "aio: /img: there is no such file" == world.node["hotplug-error"] == world.device.error
    assert not world.is_running


def test_retry_after_an_error_clears_it() -> None:
    """A vbd that is attached anew loses the error of its former life."""
    world = World()
    world.see()
    world.send(control.Failed("no", 2))
    world.settle()
    world.node = {**NODE, "hotplug-status": "error", "hotplug-error": "no"}
    world.settle()

    assert "connected" == world.node["hotplug-status"]
    assert "hotplug-error" not in world.node
    assert "" == world.device.error


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("mode", None, "mode"),
        ("mode", "rw", "mode"),
        ("mode", "W", "mode"),
        ("params", "", "params"),
        ("params", "nosuchdriver:x", "nosuchdriver"),
        ("frontend", "/local/domain/50/device/vbd/51712", "domain 5's path"),
        ("frontend", "/local/domain/5", "domain 5's path"),
        ("frontend", None, "frontend"),
    ],
)
def test_refused_keys_start_no_worker(key: str, value: str | None, part: str) -> None:
    """R15: keys that cannot be meant are refused with a sentence, and no process is started for them."""
    node = {**NODE, key: value}
    world = World({name: text for name, text in node.items() if text is not None})
    world.settle()

    assert world.node is not None
    assert not world.is_running
    assert ("2", "error") == (world.node["state"], world.node["hotplug-status"])
    assert part in world.node["hotplug-error"]


def test_keys_that_are_put_right_are_served() -> None:
    """A directory that is written key by key is served once it is complete."""
    world = World({"state": "1", "script": "x"})
    world.settle()
    world.node = {**NODE, **(world.node or {})}
    world.settle()

    assert world.is_running
    assert "connected" == world.node["hotplug-status"]


def test_rings_that_cannot_be_mapped_close_the_vbd_until_the_frontend_starts_anew() -> None:
    """A failed connect ends in Closed, is not repeated, and is forgiven when the frontend starts anew."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.see()
    world.inbox.clear()
    world.send(control.Failed("ring-ref is missing", 22))
    world.settle()
    assert ("6", Phase.OPEN, "ring-ref is missing") == (world.state, world.device.phase, world.device.error)
    world.theirs = S.INITIALISING
    world.settle()
    assert ("2", "") == (world.state, world.device.error)


@pytest.mark.parametrize("theirs", [S.INITIALISED, S.CONNECTED, S.CLOSING])
def test_a_dead_worker_is_followed_by_another_one(theirs: S) -> None:
    """A guest that has rings sees nothing of a worker's death: a successor serves the same rings, whichever state the
    guest is in, and the reason is shown until it does.
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
    """The first successor comes at once, the next ones rest longer and longer, the last one stays away: the guest waits
    in Connected for an administrator, who has a sentence and the word that helps.
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
    assert ("4", Phase.NONE) == (world.state, world.device.phase)
    assert "died, 7 in a row; `xenbackend resume` starts another one" == world.device.error
    world.send(events.Resume())
    world.settle()
    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_a_worker_that_did_something_for_the_guest_did_not_die_in_vain() -> None:
    """However often workers die: while the guest gets on, there is a next one, and at once."""
    world = connected()
    for _ in range(20):
        world.die("died", has_progressed=True)
        assert Phase.OPENING is world.device.phase
        world.answer()
        world.answer()

    assert (True, "") == (world.is_connected, world.device.error)


def test_a_frontend_that_begins_anew_gets_another_worker_after_all() -> None:
    """A guest that was given up is served again when its driver begins anew, also by a service that never opened it."""
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
    """Nobody waits yet: after the last one the vbd goes to Closed with its sentence, until it is attached anew."""
    world = World()
    world.settle()
    for _ in range(7):
        world.die("died")
        world.rest()
        world.answer()
    world.settle()

    assert world.node is not None
    assert ("6", "error", "died") == (world.state, world.node["hotplug-status"], world.device.error)
    world.node = dict(NODE)
    world.settle()
    assert ("2", True, "") == (world.state, world.is_running, world.device.error)


def test_what_cannot_be_opened_for_a_guest_that_waits_is_tried_for_ever() -> None:
    """A successor that finds the image away (a server that is down) is followed by others, later and later but always;
    the guest stays Connected and is served when the image is back.
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
    """A host that is out of memory for a moment does not cost a guest its disk."""
    world = connected()
    world.die("died", has_progressed=True)
    world.answer()
    world.inbox.remove("connect")
    world.send(control.Failed("map a grant: out of memory", 12))
    meanwhile = (world.state, world.device.error)
    world.settle()

    assert ("4", "map a grant: out of memory") == meanwhile
    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_failures_to_open_do_not_count_as_deaths() -> None:
    """An image that was away for long leaves a successor as many lives as any other one has."""
    world = connected()
    world.cannot = "no such file"
    world.die("died", has_progressed=True)
    world.settle()
    world.settle()
    world.cannot = ""
    world.settle()
    world.die("died again")

    assert (Phase.RESTING, 0.1) == (world.device.phase, world.limit)


def test_a_removal_is_finished_without_another_look() -> None:
    """A worker that dies while its vbd is removed leaves Closed behind at once: no watch would fire any more."""
    world = connected()
    remove(world)
    world.theirs = S.CLOSED
    world.see()
    world.die("died")

    assert ("6", Phase.NONE) == (world.state, world.device.phase)


def test_another_process_takes_over() -> None:
    """A worker that is to be replaced hands over in order, and the next one serves the same rings; nobody has died."""
    world = connected()
    world.send(events.Replace())
    told = (world.device.phase, world.inbox[:])
    world.answer()
    shown = world.device.error
    world.settle()

    assert (Phase.RETIRING, [control.Close(hands_over=True)]) == told
    assert "" == shown
    assert ("4", True) == (world.state, world.is_connected)
    assert world.joined is not None
    assert world.joined.goes_on


def test_a_worker_that_does_not_hand_over_is_killed() -> None:
    """Its successor goes by the journal; a node that is gone shortens the wait."""
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
    """An order that comes while a vbd has no worker does not hit the next one."""
    world = connected()
    world.die("died")
    world.die("died")
    assert world.device.phase is Phase.RESTING
    world.send(events.Replace())
    world.settle()

    assert Phase.SERVING is world.device.phase


def test_stopped_service_leaves_the_state_and_the_next_one_serves_on() -> None:
    """Stop drains and closes without a write; a new automaton finds both sides Connected and serves the same rings."""
    world = connected()
    before = dict(world.node or {})
    world.send(events.Stop())
    world.settle()
    assert (True, before) == (world.is_forgotten, world.node)
    successor = World(node=world.node, theirs=S.CONNECTED)
    successor.settle()
    assert ("4", True) == (successor.state, successor.is_connected)


def test_refused_detach_survives_a_restart_of_the_service() -> None:
    """A guest that still uses its disk after online=0 is served again by the next service, in Closing as before."""
    world = World({**NODE, "online": "0", "state": "5"}, S.CONNECTED)
    world.settle()

    assert ("5", True) == (world.state, world.is_connected)


def test_node_that_is_made_anew_lets_go_of_the_old_rings_first() -> None:
    """A toolstack that makes the same vbd again under a running worker gets a fresh one, and never the old rings."""
    world = connected()
    world.node, world.theirs = dict(NODE), S.INITIALISING
    world.see()
    assert ("1", [control.Disconnect()]) == (world.state, world.inbox)
    world.settle()
    assert ("2", False) == (world.state, world.is_connected)


def test_removal_is_finished_by_a_service_that_stops() -> None:
    """Stop in the middle of a removal still ends in Closed: the toolstack is waiting for it."""
    world = connected()
    remove(world)
    world.settle()
    world.theirs = S.CLOSED
    world.see()
    world.send(events.Stop())
    world.answer()

    assert ("6", True) == (world.state, world.is_forgotten)


def test_worker_that_takes_too_long_is_killed() -> None:
    """R23: a worker that does not answer in time is killed, and the vbd goes on with another one."""
    world = connected()
    world.theirs = S.CLOSED
    world.see()
    assert [control.Disconnect()] == world.inbox
    world.send(events.Expired())
    world.answer()
    assert "disconnecting for too long" in world.device.error
    world.settle()

    assert ("6", False, Phase.OPEN) == (world.state, world.is_connected, world.device.phase)


def test_read_only_mode_reaches_worker_and_guest() -> None:
    """Mode r opens the chain for reading and tells the guest VDISK_READONLY, whatever the chain could do."""
    device = Device(PATH, Limits())
    start = [
        each
        for each in device.handle(events.Seen({**NODE, "mode": "r"}, S.INITIALISING))
        if isinstance(each, events.Start)
    ]
    write = next(each for each in device.handle(control.Opened([LAYER])) if isinstance(each, events.Write))

    assert [True] == [each.spec.read_only for each in start]
    assert "4" == write.keys["info"]


def test_discard_that_the_toolstack_forbids_is_not_offered() -> None:
    """With discard-enable=0 we hide discard from the guest, as blkback does."""
    world = World({**NODE, "discard-enable": "0"})
    world.settle()

    assert world.node is not None
    assert "0" == world.node["feature-discard"]


@pytest.mark.parametrize(("enable", "expected"), [("0", False), ("1", True)])
def test_the_worker_is_told_what_was_offered(enable: str, *, expected: bool) -> None:
    """A frontend that asks for what we did not offer gets it from nobody: the worker knows the offer."""
    world = World({**NODE, "discard-enable": enable})
    world.device = Device(PATH, Limits(max_segments=32))
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert events.Join(can_discard=expected, max_segments=32) == world.joined


def test_a_connected_frontend_keeps_what_it_was_offered() -> None:
    """A service with other limits goes on with what its predecessor had offered, until the frontend begins anew."""
    world = World(node=connected().node, theirs=S.CONNECTED)
    world.device = Device(PATH, Limits(max_segments=32))
    world.settle()
    assert world.joined is not None
    assert world.node is not None
    assert (256, "256") == (world.joined.max_segments, world.node["feature-max-indirect-segments"])
    world.theirs = S.INITIALISING
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()
    assert (32, "32") == (world.joined.max_segments, world.node["feature-max-indirect-segments"])


@pytest.mark.parametrize("text", ["", "many", "9" * 5000, "256 ", "-1", "²"])
def test_an_offer_that_is_no_number_is_ours(text: str) -> None:
    """What stands in the node of a connected vbd and is no number of segments does not count."""
    world = World({**NODE, "state": "4", "feature-max-indirect-segments": text}, S.CONNECTED)
    world.settle()

    assert world.joined is not None
    assert 256 == world.joined.max_segments


def test_paused_disk_is_an_error_until_the_next_connection() -> None:
    """A flush that failed is said where operators look, and forgotten when the frontend connects again."""
    world = connected()
    world.send(control.Paused("a flush failed"))
    paused = world.device.error
    world.theirs = S.INITIALISING
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("a flush failed", "", "4") == (paused, world.device.error, world.state)


def test_paused_disk_is_paused_again_by_the_next_service() -> None:
    """What a failed flush lost stays lost: a service that stops leaves word of it in the node, and the next one tells
    its worker, shows it, and has it removed when somebody says to go on.
    """
    world = connected()
    world.send(control.Paused("a flush failed"))
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


def test_paused_disk_stays_paused_when_its_worker_dies() -> None:
    """The successor is told what was lost, until somebody says to go on, even while there is no worker at all."""
    world = connected()
    world.send(control.Paused("a flush failed"))
    world.die("died")
    assert "a flush failed" == world.lost
    for _ in range(6):
        world.die("died")
        world.rest()
    assert world.device.phase is Phase.NONE
    world.send(events.Resume())
    world.settle()

    assert ("", "") == (world.lost, world.device.error)
    assert "flush-failed" not in (world.node or {})


def test_a_disk_that_grew_is_told_to_the_guest() -> None:
    """A frontend looks at the size when the state is written, so that is written again with the sectors."""
    world = connected()
    writes = [
        each.keys
        for each in world.device.handle(control.Swapped("null:2G", [replace(LAYER, size=2 << 30)]))
        if isinstance(each, events.Write)
    ]

    assert [{"sectors": "4194304", "state": "4"}] == writes


def test_another_chain_is_no_reason_to_begin_anew() -> None:
    """A chain that took the place of another one is what the toolstack's keys say from now on; a third one that the
    toolstack wants meanwhile is put into service all the same.
    """
    world = connected()
    assert world.node is not None
    world.node["params"] = "null:2G"  # as the service itself writes it
    world.send(control.Swapped("null:2G", [LAYER]))
    world.settle()
    assert ("null:2G", Phase.SERVING) == (world.device.spec and world.device.spec.chain, world.device.phase)
    world.node["params"] = "null:3G"
    world.see()
    world.send(control.Swapped("null:4G", [LAYER]))
    assert "null:3G" == (world.device.spec and world.device.spec.chain)
    world.settle()

    assert "null:3G" == (world.device.spec and world.device.spec.chain)


def test_a_chain_that_a_worker_put_in_before_it_died_is_gone_on_with() -> None:
    """What the guest wrote to it must not be lost: the successor opens that one, whatever the node says as yet."""
    world = connected()
    starts = [
        each
        for each in world.device.handle(events.Ended("died", has_progressed=True, chain="null:2G"))
        if isinstance(each, events.Start)
    ]

    assert ["null:2G"] == [each.spec.chain for each in starts]


@pytest.mark.parametrize("looks_first", [True, False])
def test_the_next_service_takes_the_worker_over(*, looks_first: bool) -> None:
    """A service that is replaced leaves its worker serving; the next one asks where it stands and goes on from there,
    whether it hears that before its first look at xenstore or after.
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


def test_nothing_is_decided_before_the_first_look() -> None:
    """While xenstore is away an inherited worker serves on, and one that dies is followed when the store is back; only
    a service that stops does not wait for it.
    """
    world = connected()
    world.replace_service()
    world.answer()
    assert (Phase.SERVING, []) == (world.device.phase, world.inbox)
    world.send(control.Paused("a flush failed"))
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
    """A first look that comes late takes nothing back: neither the connection nor the pause that came before it."""
    world = connected()
    world.replace_service()
    world.inbox.clear()
    world.send(replace(world.standing(), phase="connecting", report=world.services))
    world.send(control.Connected())
    world.send(control.Paused("a flush failed"))
    world.see()

    assert (Phase.SERVING, "a flush failed") == (world.device.phase, world.device.error)
    assert "a flush failed" == (world.node or {})["flush-failed"]


def test_an_answer_to_an_earlier_service_is_none_to_this_one() -> None:
    """Two services that follow each other quickly ask the same worker: what it says to the first may be out of date."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.replace_service()
    asked = world.inbox.pop()
    world.inbox += ["connect"]  # told by the service in between
    world.replace_service()
    world.send(replace(world.standing(), report=asked.id))
    assert world.device.phase is Phase.ADOPTING
    world.settle()

    assert ("4", Phase.SERVING) == (world.state, world.device.phase)


def test_an_inherited_worker_that_has_opened_nothing_is_replaced() -> None:
    """Its service died before it could say what to open, or after that had failed."""
    world = World()
    world.see()
    world.inbox.clear()
    world.replace_service()
    world.settle()

    assert ("2", Phase.OPEN, "connected") == (world.state, world.device.phase, world.device.hotplug)


def test_an_inherited_worker_that_does_not_answer_is_killed() -> None:
    """R23: it has ten seconds to say where it stands."""
    world = connected()
    world.replace_service()
    world.see()
    assert 10.0 == world.limit
    world.send(events.Expired())
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_an_inherited_worker_with_another_chain_than_is_wanted_is_replaced() -> None:
    """A toolstack that put another disk into the same place while there was no service gets it."""
    world = connected()
    world.lose_service()
    assert world.node is not None
    world.node["params"] = "null:2G"
    world.begin_service()
    world.see()
    world.answer()
    assert [control.Close()] == world.inbox
    world.settle()

    assert "null:2G" == world.node["params"] == (world.device.spec and world.device.spec.chain)


def test_a_cdrom_is_not_replaced_because_no_worker_knows_that_it_is_one() -> None:
    """What only the guest is told of a disk is no difference to what a worker was started with."""
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
    """The worker that serves nobody any more is closed within the short limit, and nothing is left."""
    world = connected()
    world.lose_service()
    world.node = None
    world.begin_service()
    world.see()
    world.answer()
    assert ([control.Close()], FORCED_LIMIT_S) == (world.inbox, world.limit)
    world.answer()

    assert (True, False) == (world.is_forgotten, world.is_running)


def test_other_chain_in_the_same_node_restarts_the_worker() -> None:
    """When the toolstack wants another disk in the same place, the old chain is closed before the new one is opened."""
    world = connected()
    assert world.node is not None
    world.node["params"] = "null:2G"
    world.see()
    assert [control.Close()] == world.inbox
    world.settle()
    assert ("4", "null:2G", True) == (world.state, world.device.spec and world.device.spec.chain, world.is_connected)


def test_no_ring_is_served_before_the_script_has_come() -> None:
    """A toolstack that has not seen InitWait yet would wait for it in vain: a faster frontend waits for the script."""
    world = World(theirs=S.INITIALISED, runs_script=False)
    world.settle()
    before = (world.state, world.device.hotplug, world.is_connected)
    world.send(events.Called())
    world.settle()

    assert ("2", "", False) == before
    assert ("4", "connected", True) == (world.state, world.device.hotplug, world.is_connected)


def test_the_next_service_knows_that_the_script_has_come() -> None:
    """A service that was started again serves a vbd whose script has come, without waiting for another one."""
    world = World(runs_script=False)
    assert world.node is not None
    world.node |= {"state": "2", "hotplug-status": "connected"}
    world.theirs = S.INITIALISED
    world.settle()

    assert "4" == world.state


def test_a_vbd_without_a_script_is_not_waited_for() -> None:
    """Where the toolstack names no script, none will come."""
    world = World(theirs=S.INITIALISED, runs_script=False)
    assert world.node is not None
    del world.node["script"]
    world.settle()

    assert "4" == world.state


def test_a_script_that_comes_after_the_failure_is_told() -> None:
    """A chain that failed before the script came leaves its sentence at once, and the status when the script asks."""
    world = World(runs_script=False)
    world.see()
    world.inbox.clear()
    world.send(control.Failed("aio: /img: there is no such file", 2))
    world.settle()
    assert world.node is not None
    before = (world.node["hotplug-error"], world.device.hotplug)
    world.send(events.Called())

    assert ("aio: /img: there is no such file", "") == before
    assert ("2", "error") == (world.state, world.device.hotplug)


def test_a_node_that_is_made_anew_waits_for_its_own_script() -> None:
    """The script of a former vbd in the same place counts for nothing."""
    world = connected()
    world.node = dict(NODE)
    world.theirs = S.INITIALISED
    world.runs_script = False
    world.settle()

    assert ("2", "") == (world.state, world.device.hotplug)


@pytest.mark.parametrize(("kind", "at"), [("vbd", "nbd+unix:///?socket=/run/x.sock"), ("vbd3", "/run/x.sock")])
def test_a_device_model_finds_the_export_until_the_frontend_connects(kind: str, at: str) -> None:
    """It stands where libxl looks when it starts QEMU, in the form that it makes QEMU's argument of, and not longer."""
    device = Device(VbdPath(kind, 0, 5, 51712), Limits())
    device.handle(events.Seen(dict(NODE), S.INITIALISING))
    device.handle(events.Called())
    device.handle(control.Opened([LAYER], "/run/x.sock"))
    offered = dict(device.keys or {})
    device.handle(events.Seen(offered, S.INITIALISED))
    device.handle(control.Connected())

    assert at == offered["physical-device-path"]
    assert "4" == (device.keys or {})["state"]
    assert "physical-device-path" not in (device.keys or {})


@pytest.mark.parametrize(("kind", "expected"), [("vbd", None), ("vbd3", "4711")])
def test_xentop_finds_the_counters_of_kind_vbd3(kind: str, expected: str | None) -> None:
    """The service's number leads to them, and stands only where somebody looks for it."""
    device = Device(VbdPath(kind, 0, 5, 51712), Limits(), pid=4711)
    device.handle(events.Seen(dict(NODE), S.INITIALISING))

    assert expected == (device.keys or {}).get("kthread-pid")
