"""The automaton of one vbd in every combination and in random order."""

from __future__ import annotations

import random

import pytest

from tests.supervisor.world import LAYER, NODE, PATH, World, remove
from xenbackend import control
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor import events
from xenbackend.supervisor.device import Device, Phase

S = XenbusState


@pytest.mark.parametrize("ours", list(S))
@pytest.mark.parametrize("theirs", list(S))
def test_every_combination_has_a_result(ours: S, theirs: S) -> None:
    """R16: from each pair of states and each phase, every event leads to a state without an exception, twice alike."""
    messages: list[events.Event] = [
        events.Seen(None, theirs), events.Seen({"state": "4"}, theirs), events.Postponed(), events.Ended("x"),
        events.Expired(), events.Called(), events.Stop(),
        control.Opened([LAYER]), control.Failed("x", 5), control.Connected(),
        control.Halted(0, "x"), control.Paused("x"), control.Disconnected(), control.Closed(),
    ]  # fmt: skip
    for phase in Phase:
        for online in "01":
            for event in messages:
                device = Device(PATH, Limits())
                node = {**NODE, "state": str(ours.value), "online": online}
                device.handle(events.Seen(node, theirs))
                device.phase = phase
                device.handle(event)
                seen = events.Seen(device.keys, theirs)
                device.handle(seen)

                again = device.handle(events.Seen(device.keys, theirs))
                assert [] == [each for each in again if each != events.Forget()]


@pytest.mark.slow
def test_random_walks_keep_the_invariants() -> None:
    """R16: in any order of events nothing escapes, Connected needs served rings, and a removed vbd ends in Closed."""
    generator = random.Random(20)
    world = World()
    for _ in range(100_000):
        _random_step(world, generator)
        if world.is_forgotten:
            world = World()
        if generator.random() < 0.001 and world.node is not None:
            _check_that_removal_ends(world)
            world = World()


def _random_step(world: World, generator: random.Random) -> None:
    kinds = (_frontend_moves, World.answer, World.see, _toolstack_writes, _worker_fails, _node_is_replaced)
    step = generator.choices(kinds, weights=(35, 35, 10, 8, 4, 1))[0]
    if step in (World.answer, World.see):
        step(world)  # type: ignore[call-arg]
    else:
        step(world, generator)  # type: ignore[call-arg]


def _frontend_moves(world: World, generator: random.Random) -> None:
    world.theirs = generator.choice(list(S))
    world.see()


def _toolstack_writes(world: World, generator: random.Random) -> None:
    if world.node is not None:
        world.node["online"] = generator.choice("0111")
        # Only 4 is left out: whoever writes Connected in our place has to be believed.
        world.node["state"] = generator.choice([world.node.get("state", "1")] * 8 + list("01235678"))


def _worker_fails(world: World, generator: random.Random) -> None:
    kind = generator.choice(("dies", "expires", "refuses", "store"))
    if kind == "dies" and world.is_running:
        world.die("died")
    elif kind == "expires" and world.limit is not None:
        world.send(events.Expired())
    elif kind != "dies" and "connect" in world.inbox:
        world.inbox.remove("connect")
        world.send(control.Failed("rings", 22) if kind == "refuses" else events.Postponed())


def _node_is_replaced(world: World, generator: random.Random) -> None:
    world.node = generator.choice((None, dict(NODE)))


def _check_that_removal_ends(world: World) -> None:
    remove(world) if world.state is not None else None
    world.theirs = S.UNKNOWN
    world.settle()

    assert not world.is_running
    assert world.state in ("6", None, "0", "9")
