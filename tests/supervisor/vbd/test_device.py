"""The automaton of one vbd: its life in the cases that guests and toolstacks make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import LAYER, NODE, PATH, World, connected, remove
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import FORCED_LIMIT_S, Device, Phase

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
    assert ("4", [messages.Disconnect()]) == (world.state, world.inbox)
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
    assert ("5", [messages.Close()]) == (world.state, world.inbox)
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
    assert ([messages.Close()], FORCED_LIMIT_S) == (world.inbox, world.limit)
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
    world.send(messages.Failed("aio: /img: there is no such file", 2))
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
    world.send(messages.Failed("no", 2))
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
    world.send(messages.Failed("ring-ref is missing", 22))
    world.settle()
    assert ("6", Phase.OPEN, "ring-ref is missing") == (world.state, world.device.phase, world.device.error)
    world.theirs = S.INITIALISING
    world.settle()
    assert ("2", "") == (world.state, world.device.error)


def test_node_that_is_made_anew_lets_go_of_the_old_rings_first() -> None:
    """A toolstack that makes the same vbd again under a running worker gets a fresh one, and never the old rings."""
    world = connected()
    world.node, world.theirs = dict(NODE), S.INITIALISING
    world.see()
    assert ("1", [messages.Disconnect()]) == (world.state, world.inbox)
    world.settle()
    assert ("2", False) == (world.state, world.is_connected)


def test_read_only_mode_reaches_worker_and_guest() -> None:
    """Mode r opens the chain for reading and tells the guest VDISK_READONLY, whatever the chain could do."""
    device = Device(PATH, Limits())
    start = [
        each
        for each in device.handle(events.Seen({**NODE, "mode": "r"}, S.INITIALISING))
        if isinstance(each, events.Start)
    ]
    write = next(each for each in device.handle(messages.Opened([LAYER])) if isinstance(each, events.Write))

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
    world.send(messages.Paused("a flush failed"))
    paused = world.device.error
    world.theirs = S.INITIALISING
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("a flush failed", "", "4") == (paused, world.device.error, world.state)


def test_a_disk_that_grew_is_told_to_the_guest() -> None:
    """A frontend looks at the size when the state is written, so that is written again with the sectors."""
    world = connected()
    writes = [
        each.keys
        for each in world.device.handle(messages.Swapped("null:2G", [replace(LAYER, size=2 << 30)]))
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
    world.send(messages.Swapped("null:2G", [LAYER]))
    world.settle()
    assert ("null:2G", Phase.SERVING) == (world.device.spec and world.device.spec.chain, world.device.phase)
    world.node["params"] = "null:3G"
    world.see()
    world.send(messages.Swapped("null:4G", [LAYER]))
    assert "null:3G" == (world.device.spec and world.device.spec.chain)
    world.settle()

    assert "null:3G" == (world.device.spec and world.device.spec.chain)


def test_other_chain_in_the_same_node_restarts_the_worker() -> None:
    """When the toolstack wants another disk in the same place, the old chain is closed before the new one is opened."""
    world = connected()
    assert world.node is not None
    world.node["params"] = "null:2G"
    world.see()
    assert [messages.Close()] == world.inbox
    world.settle()
    assert ("4", "null:2G", True) == (world.state, world.device.spec and world.device.spec.chain, world.is_connected)
