"""Checks of what must hold when everything is at rest, and when everything has gone.

Must not change anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xenbackend import journal
from xenbackend.rig.frontend import CONNECTED
from xenbackend.supervisor.vbd.notes import Notes

if TYPE_CHECKING:
    from tests.model.fleet import WorkerProcess
    from tests.model.guests import Place
    from tests.model.world import World


def at_rest(world: World) -> None:
    """Check that everything was answered, and that all places that hold a fact hold the same."""
    for number, each in enumerate(world.administrators):
        if each.asking is not None:
            world.blame(f"administrator {number} was never answered: {each.asking.request}")
    for entry in world.ask_now({"verb": "orders"}) or []:
        if entry["ended"] is None:
            world.blame(f"an order was never closed: {entry}")
    for place in world.places:
        _at_rest(world, place)
    faults = [] if world.faults else world.images.faults()
    for fault in faults:
        world.blame(fault)


def _at_rest(world: World, place: Place) -> None:
    if place.truth is None or place.is_leaving:
        return
    vbd = world.vbd_of(place)
    if vbd is None:
        world.blame(f"{place}: there is a node, and no vbd")
        return
    worker = world.worker_of(place)
    _check_chain(world, place, vbd, worker)
    if worker is not None:
        _check_files(world, place, worker)
    if vbd.orders.under_way:
        world.blame(f"{place}: orders are under way that nobody will end: {vbd.orders.under_way}")
    others = [each for each in world.workers if each is not worker and each.vbd.startswith(f"{place}#")]
    if others:
        world.blame(f"{place}: workers that nobody owns: {others}")
    _check_guest(world, place, vbd, worker)


def _check_chain(world: World, place: Place, vbd: Any, worker: WorkerProcess | None) -> None:
    """Check that truth, params, notes, vbd, worker and journal have the same chain."""
    assert place.truth is not None
    notes: Notes = vbd.handover.notes
    found = {"truth": place.truth.chain, "params": place.params(), "notes": notes.chain, "vbd": vbd.chain_in_service()}
    if worker is not None:
        found["worker"] = worker.chain
        agreed = journal.AGREED.read(vbd.handover.page)
        if worker.connection is not None:
            found["AGREED"] = agreed["chain"] if agreed else None
    if len({*found.values()}) != 1:
        world.blame(f"{place}: who knows which chain is in service? {found}")
    if notes.exchange is not None:
        world.blame(f"{place}: an exchange is noted that nobody waits for: {notes.exchange}")


def _check_guest(world: World, place: Place, vbd: Any, worker: WorkerProcess | None) -> None:
    """Check that a guest is served, and has its answers."""
    why = f"{vbd.device.phase}, {vbd.device.error!r}, {vbd.handover.notes}"
    if place.is_waiting:
        world.blame(f"{place}: the guest was never answered; {why}")
    if place.is_connected and (worker is None or worker.connection is None):
        world.blame(f"{place}: the guest is connected, and nobody serves it: {why}")
    if place.is_connected and place.backend_state() != CONNECTED:
        world.blame(f"{place}: the guest is connected, and our state is {place.backend_state()}: {why}")


def _check_files(world: World, place: Place, worker: WorkerProcess) -> None:
    """Check that a worker has open the files that its chain needs, and no other image."""
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in world.machine.fds_of(worker)]  # noqa: PTH115 - a text
    opened = {name for name in names if name.startswith(str(world.directory))}
    stages = worker.stages
    wanted = {Path(name).resolve() for each in stages.layers for name in _files_of(each.text)} if stages else set()
    if {os.stat(name).st_ino for name in opened} != {os.stat(name).st_ino for name in wanted}:  # noqa: PTH116 - likewise
        world.blame(f"{place}: its worker has {opened} open, its chain needs {wanted}")


def _files_of(text: str) -> list[str]:
    driver, _, rest = text.partition(":")
    return [rest.split(",")[0]] if driver in ("aio", "qcow2") else []


def when_all_is_gone(world: World) -> None:
    """Check that nothing is left of a disk that is gone."""
    service: Any = world.service.service if world.service else None
    if service is None:
        world.blame("there is no service")
        return
    for place in world.places:
        if place.is_there:
            world.blame(f"{place}: it was never let go; our state is {place.backend_state()}")
        if world.vbd_of(place) is not None:
            world.blame(f"{place}: there is a vbd without a node")
    if world.workers:
        world.blame(f"workers without a disk: {[each.vbd for each in world.workers]}")
    left = [name for name in world.kept if name.startswith("vbd")]
    if left:
        world.blame(f"the keeper still has {left}")
    held = world.machine.hypervisor.call(world.machine.hypervisor.enter(), "held", {})[0]
    if any(held.values()):
        world.blame(f"backends hold {held}")
