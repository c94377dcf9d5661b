"""The automaton of one vbd: a successor finds another file, or a smaller one, than its predecessor."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.supervisor.world import LAYER, World, connected
from xenbackend.blkif.handshake import XenbusState
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.phase import Phase

S = XenbusState
OTHER = "/img is another file"
SMALLER = replace(LAYER, size=LAYER.size // 2)
COARSER = replace(LAYER, sector_size=4096)


def waits(world: World) -> bool:
    """Return whether the guest waits in Connected for an administrator, without a worker."""
    world.settle()
    return (world.state, world.device.phase, world.is_running) == ("4", Phase.NONE, False)


@pytest.mark.parametrize("by", ["death", "replacement"])
def test_another_file_is_not_served(by: str) -> None:
    """If a successor finds that a name now means another file, the guest waits, and no further worker is tried. After
    `resume` the chain is opened once more, and the guest goes on.
    """
    world = connected()
    world.cannot, world.code = OTHER, errno.ESTALE
    if by == "death":
        world.die("died")
    else:
        world.send(events.Replace())
    assert waits(world)
    assert (OTHER, "other-file") == (world.device.error, world.device.reason)
    world.cannot = ""
    assert waits(world)
    world.send(events.Resume())
    world.settle()

    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_a_file_that_nobody_was_served_from_yet_is_only_one_that_cannot_be_opened() -> None:
    """Before a guest was served, another file is reported to the script like any other failure to open."""
    world = World(cannot=OTHER, code=errno.ESTALE)
    world.settle()

    assert (OTHER, "cannot-open") == ((world.node or {})["hotplug-error"], world.device.reason)


@pytest.mark.parametrize(
    ("top", "words"),
    [
        (SMALLER, "null:1G has 536870912 bytes, and the guest was told 1073741824"),
        (COARSER, "null:1G has sectors of 4096 bytes, and the guest was told 512"),
    ],
)
def test_what_has_shrunk_is_not_served(top: object, words: str) -> None:
    """If a successor's disk is smaller than the guest was told, or has other sectors, the guest waits, and its keys are
    left as it has read them. `resume` serves it once the disk is as it was.
    """
    world = connected()
    told = dict(world.node or {})
    world.top = top
    world.die("died")

    assert waits(world)
    assert world.device.error.startswith(words)
    assert "`xenbackend resume`" in world.device.error
    assert "other-size" == world.device.reason
    assert told == world.node
    world.send(events.Resume())
    assert waits(world)
    world.top = LAYER
    world.send(events.Resume())
    world.settle()
    assert ("4", True, "") == (world.state, world.is_connected, world.device.error)


def test_the_next_service_compares_too() -> None:
    """A new service that knows nothing else of the disk's past compares its size with the keys in xenstore."""
    world = World(node=connected().node, theirs=S.CONNECTED, top=SMALLER)

    assert waits(world)
    assert "other-size" == world.device.reason


def test_a_larger_disk_is_served_and_shown() -> None:
    """A disk that has become larger is served, and the guest is told the new size."""
    world = connected()
    world.top = replace(LAYER, size=2 * LAYER.size)
    world.die("died")
    world.settle()

    assert ("4194304", True) == ((world.node or {})["sectors"], world.is_connected)


def test_the_toolstack_may_name_a_smaller_disk() -> None:
    """If the toolstack names another, smaller disk (a changed medium), it is served, and the guest is told the size."""
    world = connected()
    world.top = replace(SMALLER, text="null:512M")
    assert world.node is not None
    world.node["params"] = "null:512M"
    world.settle()

    assert ("4", True, "1048576") == (world.state, world.is_connected, world.node["sectors"])
    world.top = replace(SMALLER, size=SMALLER.size // 2)
    world.die("died")
    assert waits(world)
    assert "other-size" == world.device.reason


def test_a_frontend_that_begins_anew_takes_a_smaller_disk() -> None:
    """A frontend that starts anew is served a smaller disk, since it reads the size again."""
    world = connected()
    world.top = SMALLER
    world.die("died")
    assert waits(world)
    world.theirs = S.INITIALISING
    world.settle()

    assert ("2", Phase.OPEN, "", "1048576") == (
        world.state, world.device.phase, world.device.error, (world.node or {})["sectors"]
    )  # fmt: skip
