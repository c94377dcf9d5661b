"""The automaton of one vbd with every combination of states, phases and events, and with events in random order."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tests import figures
from tests.supervisor.world import IDLE, LAYER, NODE, PATH, World, connected, remove
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.phase import Phase

S = XenbusState


@pytest.mark.parametrize("ours", list(S))
@pytest.mark.parametrize("theirs", list(S))
@pytest.mark.rows("A9", "R16")
def test_every_combination_has_a_result(ours: S, theirs: S) -> None:
    """R16: in each pair of states and each phase, every event is handled without an exception, and looking again
    changes nothing.
    """
    given: list[events.Event] = [
        events.Seen(None, theirs), events.Seen({"state": "4"}, theirs), events.Postponed(), events.Ended("x"),
        events.Ended("x", has_progressed=True), events.Ended("x", is_unfinished=True), events.Expired(),
        events.Waits("/a"), events.Waits(""), events.Ended("x", has_waited=True),
        events.Called(), events.Stop(), events.Stop(is_unfinished=True), events.Stop(leaves=True),
        events.Inherited(), events.Resume(), events.Replace(), events.Refused("x"),
        events.Exchanged(("null:1G",), "null:2G"), events.Exchanged(("null:3G",), "null:2G"),
        *(replace(IDLE, stage=stage, failure=failure) for stage in Stage for failure in ("", "x")),
        replace(IDLE, stage=Stage.SERVING, layers=[LAYER], trouble="x", halted="x", flush_failed="x", is_paused=True),
    ]  # fmt: skip
    for phase in Phase:
        for online in "01":
            for event in given:
                device = Device(PATH, Limits())
                node = {**NODE, "state": str(ours.value), "online": online}
                device.handle(events.Seen(node, theirs))
                device.phase = phase
                device.handle(event)
                seen = events.Seen(device.sight.keys, theirs)
                device.handle(seen)

                again = device.handle(events.Seen(device.sight.keys, theirs))
                assert [] == [each for each in again if each != events.Forget()]


@pytest.mark.slow
@pytest.mark.rows("A9", "R16")
def test_random_walks_keep_the_invariants(request: pytest.FixtureRequest) -> None:
    """R16: in any order of events, deaths of workers and services included: a connected guest is never let down; there
    are never two workers; Connected implies that the rings are served, and Closed that there is no worker; a new node
    gets nothing of the former vbd. In the end the guest is served or has an error, and a removed vbd is Closed, with
    nothing left of it.
    """
    generator = random.Random(request.config.getoption("--seed") + 19)
    least = 300_000 if request.config.getoption("--long") else 30_000
    steps = max(least, request.config.getoption("--requests"))
    world = World()
    seen = Counter[str]()
    for _ in range(steps):
        _random_step(world, generator)
        seen.update([world.device.phase.value, f"state {world.state}", f"lives {min(world.lives, 2)}"])
        seen.update(["over"] if world.device.sight.is_over else [])
        if world.is_forgotten and (world.state is None or world.is_stopped):
            world = World()
        if generator.random() < 0.001 and world.node is not None:
            _check_that_it_serves_again(world)
            _check_that_removal_ends(world)
            world = World()

    assert set(Phase) == {phase for phase in Phase if seen[phase.value]}
    assert all(seen[each] > 100 for each in ("state 2", "state 4", "state 5", "state 6", "lives 2", "over")), seen
    figures.add("values and walks", steps)


@pytest.mark.parametrize("death", ["worker", "service", "both"])
def test_a_death_at_any_step_is_no_more_than_a_delay(death: str) -> None:
    """If a worker, a service or both die after any step on the way from a new vbd to Connected, the guest is served in
    the end, and nothing is left after a detach.
    """
    for dies_at in range(30):
        world = World()
        for step in range(40):
            if step == dies_at:
                _die(world, death)
            (world.see if step % 2 else world.answer)()
            if step == 8:
                world.theirs = S.INITIALISED
            if world.state == "4":
                world.theirs = S.CONNECTED
        world.settle()
        assert ("4", True, "") == (world.state, world.is_connected, world.device.error), f"a death at step {dies_at}"
        _check_that_removal_ends(world)


@pytest.mark.parametrize("death", ["worker", "service", "both"])
@pytest.mark.parametrize("theirs", [S.CLOSING, S.CLOSED, S.UNKNOWN])
def test_a_death_at_any_step_of_a_removal_is_no_more_than_a_delay(death: str, theirs: S) -> None:
    """If a worker, a service or both die at any step of a detach, the vbd ends in Closed, and nothing is left of it."""
    for dies_at in range(12):
        world = connected()
        remove(world)
        for step in range(12):
            if step == dies_at:
                _die(world, death)
            (world.see if step % 2 else world.answer)()
            if step == 4:
                world.theirs = theirs
        _check_that_removal_ends(world)


def _die(world: World, death: str) -> None:
    if death != "worker":
        world.lose_service()
    if death != "service" and world.is_running:
        world.die("died")
    if death != "worker":
        world.begin_service()


def _random_step(world: World, generator: random.Random) -> None:
    kinds = (
        _frontend_moves, World.answer, World.see, _toolstack_writes, _worker_fails, _worker_says, _node_is_replaced,
        _service_changes, _operator_asks,
    )  # fmt: skip
    step = generator.choices(kinds, weights=(35, 35, 10, 8, 4, 2, 1, 2, 1))[0]
    if step in (World.answer, World.see):
        step(world)
    else:
        step(world, generator)


def _frontend_moves(world: World, generator: random.Random) -> None:
    world.theirs = generator.choice(list(S))
    world.see()


def _toolstack_writes(world: World, generator: random.Random) -> None:
    if world.node is not None:
        world.node["online"] = generator.choice("0111")
        # All but 4: if somebody writes Connected in our place, we have to believe it.
        world.node["state"] = generator.choice([world.node.get("state", "1")] * 8 + list("01235678"))


def _worker_fails(world: World, generator: random.Random) -> None:
    kind = generator.choice(("dies", "dies", "expires", "refuses", "store", "cannot"))
    if kind == "dies" and world.is_running:
        world.die("died", has_progressed=generator.random() < 0.5)
    elif kind == "expires" and world.limit is not None:
        world.send(events.Expired())
    elif kind == "cannot":
        world.cannot = generator.choice(("", "it cannot be opened"))
    elif kind == "refuses" and world.inbox[:1] == ["connect"]:
        world.refuse("rings")
    elif kind == "store" and world.inbox[-1:] == ["connect"]:  # it was never told
        world.inbox.pop()
        world.send(events.Postponed() if generator.random() < 0.5 else events.Refused("rings"))


def _worker_says(world: World, generator: random.Random) -> None:
    if generator.random() < 0.2:
        world.lie(generator.choice(list(Stage)))
    else:
        world.say(**{generator.choice(("trouble", "halted", "flush_failed")): generator.choice(("", "x"))})


def _service_changes(world: World, generator: random.Random) -> None:
    if generator.random() < 0.5:
        world.replace_service()
        return
    world.lose_service()
    for _ in range(generator.randrange(4)):
        world.answer()
    if generator.random() < 0.2 and world.is_running:
        world.die("died with its service")
    world.begin_service()


def _operator_asks(world: World, generator: random.Random) -> None:
    exchange = events.Exchanged(("null:1G", "null:2G"), generator.choice(("null:1G", "null:2G", "null:3G")))
    order = generator.choice((events.Resume(), events.Replace(), exchange))
    if order is exchange and world.device.phase is not Phase.SERVING:
        return
    world.send(order)


def _node_is_replaced(world: World, generator: random.Random) -> None:
    world.node = generator.choice((None, dict(NODE), {**NODE, "state": "2"}, {**NODE, "params": "null:2G"}))


def _check_that_it_serves_again(world: World) -> None:
    assert world.node is not None
    world.cannot = ""
    if world.node.get("state") != "4" or world.device.sight.ours is not S.CONNECTED or world.node["online"] == "0":
        return
    world.theirs = S.CONNECTED
    world.settle()

    assert world.state == "4"
    assert world.is_connected or world.device.error


def _check_that_removal_ends(world: World) -> None:
    remove(world) if world.state is not None else None
    world.theirs = S.UNKNOWN
    world.settle()

    assert not world.is_running
    assert world.state in ("6", None, "0", "9")
    world.node = None
    world.settle()
    assert world.is_forgotten
