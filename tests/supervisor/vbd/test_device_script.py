"""The automaton of one vbd: what the toolstack's script and a device model wait for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervisor.world import IDLE, LAYER, NODE, World, connected
from xenbackend.blkif.features import Limits
from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd import events
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.xenstore.paths import VbdPath

S = XenbusState


def test_no_ring_is_served_before_the_script_has_come() -> None:
    """No rings are served before the script has come, as the toolstack waits for InitWait: a faster frontend has to
    wait.
    """
    world = World(theirs=S.INITIALISED, runs_script=False)
    world.settle()
    before = (world.state, world.device.sight.hotplug, world.is_connected)
    world.send(events.Called())
    world.settle()

    assert ("2", "", False) == before
    assert ("4", "connected", True) == (world.state, world.device.sight.hotplug, world.is_connected)


def test_the_next_service_knows_that_the_script_has_come() -> None:
    """A restarted service serves a vbd whose script has come already, without waiting for another one."""
    world = World(runs_script=False)
    assert world.node is not None
    world.node |= {"state": "2", "hotplug-status": "connected"}
    world.theirs = S.INITIALISED
    world.settle()

    assert "4" == world.state


def test_a_vbd_without_a_script_is_not_waited_for() -> None:
    """A vbd whose toolstack names no script is served without waiting for one."""
    world = World(theirs=S.INITIALISED, runs_script=False)
    assert world.node is not None
    del world.node["script"]
    world.settle()

    assert "4" == world.state


def test_a_script_that_comes_after_the_failure_is_told() -> None:
    """If a chain fails before the script has come, the error is written at once, the status when the script asks."""
    world = World(runs_script=False)
    world.see()
    world.refuse("aio: /img: there is no such file")
    world.settle()
    assert world.node is not None
    before = (world.node["hotplug-error"], world.device.sight.hotplug)
    world.send(events.Called())

    assert ("aio: /img: there is no such file", "") == before
    assert ("2", "error") == (world.state, world.device.sight.hotplug)


def test_a_node_that_is_made_anew_waits_for_its_own_script() -> None:
    """A new vbd waits for its own script, although that of the former vbd in the same place had come."""
    world = connected()
    world.node = dict(NODE)
    world.theirs = S.INITIALISED
    world.runs_script = False
    world.settle()

    assert ("2", "", 2) == (world.state, world.device.sight.hotplug, world.lives)


@pytest.mark.parametrize(("kind", "at"), [("vbd", "nbd+unix:///?socket=/run/x.sock"), ("vbd3", "/run/x.sock")])
def test_a_device_model_finds_the_export_until_the_frontend_connects(kind: str, at: str) -> None:
    """Until the frontend connects, the export stands where libxl looks for QEMU's disk, in the form that libxl passes
    on.
    """
    device = Device(VbdPath(kind, 0, 5, 51712), Limits())
    device.handle(events.Seen(dict(NODE), S.INITIALISING))
    device.handle(events.Called())
    device.handle(replace(IDLE, stage=Stage.OPEN, layers=[LAYER], export="/run/x.sock"))
    offered, may_boot = dict(device.sight.keys or {}), device.may_boot
    device.handle(events.Seen(offered, S.INITIALISED))
    device.handle(replace(IDLE, stage=Stage.SERVING, layers=[LAYER]))

    assert at == offered["physical-device-path"]
    assert "4" == (device.sight.keys or {})["state"]
    assert "physical-device-path" not in (device.sight.keys or {})
    device.handle(events.Seen({**(device.sight.keys or {}), "state": "2"}, S.INITIALISING))
    assert (True, False) == (may_boot, device.may_boot)


@pytest.mark.parametrize(("kind", "expected"), [("vbd", None), ("vbd3", "4711")])
def test_xentop_finds_the_counters_of_kind_vbd3(kind: str, expected: str | None) -> None:
    """A vbd of kind vbd3, and no other, has the service's process number, by which xentop finds its counters."""
    device = Device(VbdPath(kind, 0, 5, 51712), Limits(), pid=4711)
    device.handle(events.Seen(dict(NODE), S.INITIALISING))

    assert expected == (device.sight.keys or {}).get("kthread-pid")
