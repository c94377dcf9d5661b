"""The automaton of one vbd: its life in the cases that guests and toolstacks bring about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import IDLE, LAYER, NODE, PATH, World, connected, remove
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.phase import FORCED_LIMIT_S, LINGER_S, Phase

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
    """When a frontend has gone through Closing and Closed, the worker is closed, and the vbd is Closed once that has
    ended, so that the image is free. At Initialising the disk is offered again, and another worker serves it.
    """
    world = connected()
    world.theirs = S.CLOSING
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSED
    world.see()
    assert ("5", [events.Close()]) == (world.state, world.inbox)
    world.settle()
    assert ("6", False, Phase.NONE) == (world.state, world.is_running, world.device.phase)
    world.theirs = S.INITIALISING
    world.settle()
    assert "2" == world.state
    world.theirs = S.INITIALISED
    world.settle()
    assert "4" == world.state


def test_guest_that_comes_back_between_two_looks_is_served() -> None:
    """A frontend that goes through Closed to Initialised between two looks is served: GRUB hands a disk over like that,
    and the next driver does not wait for InitWait.
    """
    world = connected()
    world.theirs = S.CLOSED
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("4", True) == (world.state, world.is_connected)


def test_guest_that_comes_back_between_two_looks_gets_another_worker() -> None:
    """Such a frontend is also served if its worker has died meanwhile."""
    world = connected()
    world.die("the worker was ended by SIGKILL")
    world.theirs = S.CLOSED
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert ("4", "") == (world.state, world.device.error)


def test_frontend_that_starts_anew_is_disconnected_first() -> None:
    """If a frontend goes to Initialising while we are Connected (kexec), it is offered the vbd once its old rings are
    unmapped.
    """
    world = connected()
    world.theirs = S.INITIALISING
    world.see()
    assert ("4", [events.Leave()]) == (world.state, world.inbox)
    world.answer()
    assert "2" == world.state


@pytest.mark.parametrize("theirs", [S.UNKNOWN, S.INITIALISING, S.INITIALISED, S.CLOSED])
def test_removal_of_a_vbd_that_never_connected(theirs: S) -> None:
    """After online=0 a vbd closes its chain and ends in Closed, whether or not a frontend ever came."""
    world = World()
    world.see()
    world.theirs = theirs
    remove(world)
    world.settle()

    assert ("6", False) == (world.state, world.is_running)


def test_removal_waits_for_a_connected_frontend() -> None:
    """After online=0 a connected frontend is served until it has closed, and Closed comes after the worker's end."""
    world = connected()
    remove(world)
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSING
    world.settle()
    assert ("5", True) == (world.state, world.is_connected)
    world.theirs = S.CLOSED
    world.see()
    assert ("5", [events.Close()]) == (world.state, world.inbox)
    world.answer()
    assert "6" == world.state


@pytest.mark.rows("A2", "R23")
def test_forced_removal_does_not_wait_for_the_guest() -> None:
    """R23: once the frontend's directory is gone, a vbd that is being removed ends whatever the guest does. It is
    served until its driver is quiet, or for a few seconds, as it may have to flush.
    """
    world = connected()
    remove(world)
    world.theirs = S.UNKNOWN
    world.see()
    world.answer()
    world.see()
    assert ("5", True, True, LINGER_S) == (world.state, world.is_connected, world.lingers, world.limit)
    world.send(events.Expired())
    world.settle()

    assert ("6", False, None) == (world.state, world.is_running, world.limit)


@pytest.mark.parametrize("why", ["the guest has left", "the worker dies", "the node goes", "the service stops"])
def test_nobody_lingers_in_vain(why: str) -> None:
    """That wait is left out if the guest was migrated away, as its next host waits for the image, or if the worker has
    died, the node is gone or the service stops.
    """
    world = connected()
    remove(world)
    world.theirs, world.has_left = S.UNKNOWN, why == "the guest has left"
    world.see()
    assert world.lingers is not world.has_left
    if why == "the worker dies":
        world.die("it was killed")
    elif why == "the node goes":
        world.node = None
    elif why == "the service stops":
        world.send(events.Stop())
    world.see()
    world.answer()
    world.see()

    assert not world.is_running
    assert world.state in ("6", "5" if why == "the service stops" else None)


@pytest.mark.rows("C13")
def test_vanished_node_is_a_forced_close() -> None:
    """If the backend directory is gone, the vbd is closed within a short limit, and nothing is written."""
    world = connected()
    world.node = None
    world.see()
    assert ([events.Close()], FORCED_LIMIT_S) == (world.inbox, world.limit)
    world.send(events.Expired())
    world.answer()
    assert (True, None) == (world.is_forgotten, world.node)


@pytest.mark.rows("C13")
def test_single_missing_state_is_a_forced_close() -> None:
    """A directory without a state is no vbd any more: the worker is closed, and no key is written."""
    world = connected()
    assert world.node is not None
    del world.node["state"]
    before = dict(world.node)
    world.settle()

    assert (False, before) == (world.is_running, world.node)


def test_chain_that_cannot_be_opened_is_reported_and_the_state_stays() -> None:
    """A failure to open is reported in hotplug-error and hotplug-status; the state stays InitWait, and no further try
    is made.
    """
    world = World()
    world.see()
    world.refuse("aio: /img: there is no such file")
    world.answer()
    world.theirs = S.INITIALISED
    world.settle()

    assert world.node is not None
    assert ("2", "error") == (world.node["state"], world.node["hotplug-status"])
    assert "aio: /img: there is no such file" == world.node["hotplug-error"] == world.device.error
    assert not world.is_running


def test_retry_after_an_error_clears_it() -> None:
    """A vbd that is attached again does not show the error of its former life."""
    world = World()
    world.see()
    world.refuse("no")
    world.settle()
    world.node = dict(NODE)
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
    """R15: invalid keys are refused with a sentence, and no process is started for them."""
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
    assert world.node is not None
    world.node.update({**NODE, "state": "2"})
    world.settle()

    assert world.is_running
    assert "connected" == world.node["hotplug-status"]


@pytest.mark.parametrize("is_told", [True, False])
def test_rings_that_cannot_be_mapped_close_the_vbd_until_the_frontend_starts_anew(*, is_told: bool) -> None:
    """If the rings cannot be served, the vbd is Closed, and they are not tried again until the frontend starts anew."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.see()
    if is_told:
        world.refuse("ring-ref is missing")
    else:
        world.inbox.clear()
        world.send(events.Refused("ring-ref is missing"))
    world.settle()
    assert ("6", Phase.NONE, "ring-ref is missing") == (world.state, world.device.phase, world.device.error)
    world.theirs = S.INITIALISING
    world.settle()
    assert ("2", "") == (world.state, world.device.error)


@pytest.mark.parametrize("state", ["1", "2"])
def test_a_node_that_is_made_anew_ends_the_former_life(state: str) -> None:
    """If a toolstack makes the same vbd again, like libxl or like `attach`, the new one gets its own object and worker
    once the former ones are gone, by force if need be. Until then nothing is written to the new node.
    """
    world = connected()
    world.say(flush_failed="a flush failed")
    world.node, world.theirs = {**NODE, "state": state}, S.INITIALISING
    world.see()
    assert (True, [events.Close()], FORCED_LIMIT_S) == (world.device.sight.is_over, world.inbox, world.limit)
    world.see()
    world.send(events.Called())
    assert {**NODE, "state": state} == world.node
    world.answer()
    assert world.is_forgotten
    world.settle()

    assert ("2", False, 2) == (world.state, world.is_connected, world.lives)
    assert ("", "", "connected") == (world.device.error, world.lost, world.device.sight.hotplug)


@pytest.mark.rows("A15")
def test_a_vbd_that_is_over_stays_so() -> None:
    """Once a node was seen to be gone, whatever appears in its place is another vbd, even with the same keys."""
    world = connected()
    former, world.node = world.node, None
    world.see()
    world.node = former
    world.see()

    assert (True, None, S.UNKNOWN) == (world.device.sight.is_over, world.device.sight.keys, world.device.sight.theirs)
    world.settle()
    assert ("4", 2) == (world.state, world.lives)


def test_a_write_that_failed_ends_no_life() -> None:
    """A key that we write counts as ours only once it has been seen, because xenstore may have refused it."""
    world = World()
    for state in ("1", "2"):
        world.node = {**NODE, "state": state}
        world.device.handle(events.Seen(dict(world.node), S.INITIALISING))
        world.device.handle(events.Seen(dict(world.node), S.INITIALISING))

    assert not world.device.sight.is_over


def test_a_directory_that_is_made_again_with_our_keys_is_the_same_vbd() -> None:
    """A directory that is put back with all its keys, in InitWait, as a claim does it, is still the same vbd."""
    world = World()
    world.settle()
    world.send(events.Seen({**(world.node or {}), "state": "2"}, S.INITIALISING))

    assert (False, Phase.OPEN) == (world.device.sight.is_over, world.device.phase)


def test_read_only_mode_reaches_worker_and_guest() -> None:
    """With mode r the chain is opened read-only and the guest is told VDISK_READONLY, whatever the chain could do."""
    device = Device(PATH, Limits())
    start = [
        each
        for each in device.handle(events.Seen({**NODE, "mode": "r"}, S.INITIALISING))
        if isinstance(each, events.Start)
    ]
    opened = replace(IDLE, stage=Stage.OPEN, layers=[LAYER])
    write = next(each for each in device.handle(opened) if isinstance(each, events.Write))

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
    """The worker is told what was offered, so that it can refuse what a frontend asks for beyond that."""
    world = World({**NODE, "discard-enable": enable})
    world.device = Device(PATH, Limits(max_segments=32))
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()

    assert events.Join(can_discard=expected, max_segments=32) == world.joined


def test_a_connected_frontend_keeps_what_it_was_offered() -> None:
    """A service with other limits keeps to its predecessor's offer until the frontend starts anew."""
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
    """If the offer in a connected vbd's node is not a valid number of segments, our own limit counts."""
    world = World({**NODE, "state": "4", "feature-max-indirect-segments": text}, S.CONNECTED)
    world.settle()

    assert world.joined is not None
    assert 256 == world.joined.max_segments


def test_a_failed_flush_is_an_error_until_the_next_connection() -> None:
    """A failed flush is shown as the disk's error until the frontend connects again."""
    world = connected()
    world.say(flush_failed="a flush failed")
    failed = world.device.error
    for world.theirs in (S.CLOSED, S.INITIALISING):
        world.settle()
    lost = (world.lost, world.device.error)
    world.theirs = S.INITIALISED
    world.see()
    joining = (world.inbox[:], world.device.error)
    world.answer()

    assert ("a flush failed", ("", "a flush failed")) == (failed, lost)
    assert (["connect"], "") == joining
    assert ("", "4") == (world.device.error, world.state)


def test_a_disk_that_grew_is_told_to_the_guest() -> None:
    """When a disk has grown, the state is written again with the sectors: that makes a frontend read the size."""
    world = connected()
    writes = [
        each.keys
        for each in world.device.handle(replace(world.standing, layers=[replace(LAYER, size=2 << 30)]))
        if isinstance(each, events.Write)
    ]

    assert [{"sectors": "4194304", "state": "4"}] == writes


def test_params_follow_the_chain_in_service() -> None:
    """After an exchange, `params` is set to the new chain, only if it still has the former one; the same worker goes on
    serving.
    """
    world = connected()
    writes = [
        each
        for each in world.device.handle(events.Exchanged(("null:1G",), "null:2G"))
        if isinstance(each, events.Write)
    ]
    for each in writes:
        world._do(each)
    world.settle()

    assert [({"params": "null:2G"}, S.CONNECTED, "null:1G")] == [
        (each.keys, each.state, each.params) for each in writes
    ]
    assert ("null:2G", Phase.SERVING) == (world.device.sight.spec and world.device.sight.spec.chain, world.device.phase)
    assert ("null:2G", []) == ((world.node or {})["params"], world.inbox)


def test_params_follow_although_writes_fail() -> None:
    """If two exchanges were made while xenstore was away, `params`, which still has the first chain, is set to the
    last.
    """
    world = connected()
    world.device.handle(events.Exchanged(("null:1G",), "null:2G"))
    world.device.handle(events.Exchanged(("null:1G", "null:2G"), "null:3G"))
    world.settle()

    assert ("null:3G", Phase.SERVING) == ((world.node or {})["params"], world.device.phase)


def test_params_follow_while_the_vbd_is_to_go_away() -> None:
    """`params` is also set while the vbd is being removed: else the next service would open the former chain under a
    guest that is still connected.
    """
    world = connected()
    remove(world)
    world.settle()
    world.send(events.Exchanged(("null:1G",), "null:2G"))
    world.settle()

    assert ("null:2G", Phase.SERVING) == ((world.node or {})["params"], world.device.phase)


def test_a_third_chain_that_the_toolstack_wants_wins() -> None:
    """If `params` has a third chain, the toolstack wants another disk: the worker is closed, and it is opened."""
    world = connected()
    assert world.node is not None
    world.node["params"] = "null:3G"
    world.send(events.Exchanged(("null:1G",), "null:2G"))
    world.settle()

    assert ("null:3G", "null:3G") == (world.node["params"], world.device.sight.spec and world.device.sight.spec.chain)
    assert "null:3G" == world.standing.chain


def test_a_node_that_is_made_anew_keeps_its_params() -> None:
    """The `params` of a new node are kept, whatever was exchanged in the former vbd."""
    world = connected()
    world.device.handle(events.Exchanged(("null:1G",), "null:2G"))
    world.node = dict(NODE)
    world.settle()

    assert ("null:1G", "null:1G") == (world.node["params"], world.standing.chain)


def test_other_chain_in_the_same_node_restarts_the_worker() -> None:
    """If the toolstack names another disk in the same node, the old chain is closed before the new one is opened."""
    world = connected()
    assert world.node is not None
    world.node["params"] = "null:2G"
    world.see()
    assert [events.Close()] == world.inbox
    world.settle()
    assert ("4", "null:2G", True) == (
        world.state,
        world.device.sight.spec and world.device.sight.spec.chain,
        world.is_connected,
    )


def test_frontend_that_comes_back_while_the_worker_closes_is_served() -> None:
    """A frontend that is Initialised again before we are Closed is served by another worker after that."""
    world = connected()
    world.theirs = S.CLOSING
    world.settle()
    world.theirs = S.CLOSED
    world.see()
    world.theirs = S.INITIALISED
    world.see()
    assert ("5", [events.Close()]) == (world.state, world.inbox)
    world.settle()

    assert ("4", True) == (world.state, world.is_connected)


def test_closed_needs_no_worker() -> None:
    """A vbd in Closed whose frontend does nothing starts no worker, which would hold the image."""
    world = World({**NODE, "state": "6", "hotplug-status": "connected"}, S.CLOSED)
    world.settle()

    assert ("6", False) == (world.state, world.is_running)


@pytest.mark.parametrize("theirs", [S.CLOSING, S.CLOSED])
def test_frontend_that_closes_before_the_script_was_told_waits(theirs: S) -> None:
    """If a guest writes Closed at once, the toolstack still sees InitWait, and its script gets an answer."""
    world = World(theirs=theirs, runs_script=False)
    world.see()
    world.answer()
    world.see()
    offered = world.state
    world.send(events.Called())
    told = world.device.sight.hotplug
    world.settle()

    assert ("2", "connected") == (offered, told)
    assert ("5" if theirs is S.CLOSING else "6") == world.state


def test_a_disk_that_was_promised_is_opened_as_soon_as_that_can_be() -> None:
    """If the image is away when a guest's next driver starts (after a boot loader, say), it is opened once it is back:
    the script was answered long ago, so nobody else would try again.
    """
    world = connected()
    world.theirs = S.CLOSED
    world.settle()
    world.cannot = "no such file"
    world.theirs = S.INITIALISING
    world.settle()
    meanwhile = (world.state, world.device.error, (world.node or {}).get("hotplug-error"))
    world.cannot, world.theirs = "", S.INITIALISED
    world.settle()

    assert ("2", "no such file", None) == meanwhile
    assert ("4", "") == (world.state, world.device.error)


@pytest.mark.parametrize(
    ("order", "stage", "failure"),
    [
        ("open", Stage.SERVING, ""),
        ("open", Stage.CONNECTING, ""),
        ("open", Stage.OPEN, "it failed"),
        ("connect", Stage.LEAVING, ""),
        ("connect", Stage.SERVING, "it failed"),
    ],
)
def test_what_cannot_be_is_a_breach(order: str, stage: Stage, failure: str) -> None:
    """A worker whose report cannot follow from its last order is killed, with a sentence, and replaced."""
    world = World()
    if order == "connect":
        world.settle()
        world.theirs = S.INITIALISED
    world.see()
    assert [order] == world.inbox
    phase = world.device.phase
    kills = world.device.handle(replace(world.standing, stage=stage, failure=failure))

    said = f"{stage.value}{' and failed' if failure else ''}, while it was {phase.value}"
    assert [events.Kill(f"the worker was killed: it says that it is {said}", is_breach=True)] == kills
    world.die("killed")
    world.settle()
    assert world.is_running


def test_every_standing_counts() -> None:
    """Each report replaces all that the former one said about the worker, and the errors shown follow it."""
    world = connected()
    world.say(trouble="write: no room")
    troubled = world.device.error
    world.say(trouble="", halted="ring 0 was stopped: bad index")
    halted = world.device.error
    world.say(halted="")

    assert ("write: no room", "ring 0 was stopped: bad index", "") == (troubled, halted, world.device.error)


def test_a_frontend_that_is_served_before_it_says_connected_is_served_on() -> None:
    """If the toolstack writes Closing before the frontend is Connected, the frontend keeps its rings."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.settle()
    assert world.node is not None
    world.node["state"] = "5"
    world.settle()

    assert ("5", Phase.SERVING) == (world.state, world.device.phase)


def test_a_frontend_that_let_go_without_a_word_has_no_rings() -> None:
    """A frontend that goes back to InitWait is disconnected, and has no rings until new ones are served."""
    world = connected()
    world.theirs = S.INIT_WAIT
    world.settle()
    world.send(events.Seen(world.node, S.INITIALISED))

    assert (Phase.CONNECTING, False) == (world.device.phase, world.device.is_waited_for())


def test_keys_that_become_bad_do_not_keep_a_vbd_from_going_away() -> None:
    """If keys become invalid while a guest is connected, the vbd stays Connected without a worker, and its removal does
    not wait for the guest.
    """
    world = connected()
    assert world.node is not None
    world.node["mode"] = "rw"
    world.settle()
    before = (world.state, world.is_running, "mode" in world.device.error)
    remove(world)
    world.settle()

    assert (("4", False, True), "6") == (before, world.state)


def test_each_try_to_connect_has_its_own_time() -> None:
    """A try to connect that was put off, because xenstore was away, takes nothing from the next one's limit."""
    world = World()
    world.settle()
    world.theirs = S.INITIALISED
    world.see()
    limits = [world.limit]
    world.inbox.clear()
    world.send(events.Postponed())
    limits.append(world.limit)
    world.see()

    assert ([60.0, None, 60.0], ["connect"]) == ([*limits, world.limit], world.inbox)
