"""What operators ask of a vbd in service, of a registry with workers without a chain."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from tests.supervisor.helpers import PATH, Kept, Stepped, offer_ring, write_like_libxl
from xenbackend import journal
from xenbackend.errors import ChainError, ConfigError
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.device import Phase
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


@pytest.fixture
def serving(stepped: Stepped, toolstack: Store, guest: Store) -> Stepped:
    """A registry that serves a guest."""
    return serve(stepped, toolstack, guest)


def serve(stepped: Stepped, toolstack: Store, guest: Store, chain: str = "null:1G") -> Stepped:
    """Bring the vbd up to Connected on both sides."""
    write_like_libxl(toolstack, params=chain)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
    offer_ring(guest)
    stepped.until(lambda: toolstack.read(f"{PATH.backend}/state") == "4")
    guest.write(f"{PATH.frontend}/state", "4")
    stepped.until(lambda: stepped.vbd().device.theirs == 4)
    return stepped


def is_served(stepped: Stepped, but: int = 0) -> Callable[[], bool]:
    """Return whether the guest is served, by another process than `but`."""
    vbd = stepped.vbd()
    return lambda: vbd.worker is not None and vbd.worker.pid != but and vbd.device.phase is Phase.SERVING


def kill(stepped: Stepped) -> int:
    """Kill the worker, and return its number."""
    worker = stepped.vbd().worker
    assert worker is not None
    worker.kill("the test wants it")
    return worker.pid


def test_a_pause_holds_for_the_next_worker(serving: Stepped, lines: io.StringIO) -> None:
    """A disk that an administrator paused stays so when its worker dies, until the administrator resumes it."""
    orders = serving.vbd().orders
    paused = serving.ask(orders.pause)
    serving.until(is_served(serving, kill(serving)))
    again = lines.getvalue()
    resumed = serving.ask(orders.resume)
    serving.until(is_served(serving, kill(serving)))

    assert ({"data": "paused"}, {"data": "resumed"}) == (paused, resumed)
    assert "paused=True" in again
    assert "paused=False" in lines.getvalue()[len(again) :]


def test_a_pause_without_a_worker_is_one_all_the_same(stepped: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """Nothing is in flight where nobody serves: the answer comes at once, and the next worker is told."""
    write_like_libxl(toolstack, params="null:2G")
    stepped.until(lambda: stepped.vbd().device.error and stepped.vbd().worker is None)

    assert {"data": "paused"} == stepped.ask(stepped.vbd().orders.pause)
    toolstack.write(f"{PATH.backend}/params", "null:1G")
    toolstack.write(f"{PATH.backend}/state", "1")
    stepped.until(lambda: stepped.vbd().device.phase is Phase.OPEN)
    assert "paused=True" in lines.getvalue()


def test_resuming_forgives_everything(serving: Stepped) -> None:
    """A failed flush that the journal knows of does not stop the worker that comes after the order."""
    vbd = serving.vbd()
    journal.poison(vbd.handover.page, 5)
    while vbd.device.phase is not Phase.NONE:
        if vbd.device.phase is Phase.RESTING:
            serving.expire()
        elif vbd.worker is not None:
            kill(serving)
        serving.turn()
    assert "7 in a row" in vbd.device.error
    serving.ask(vbd.orders.resume)
    forgiven = journal.poisoned(vbd.handover.page)
    serving.until(is_served(serving))

    assert (0, "") == (forgiven, vbd.device.error)


def test_another_chain_is_put_in(serving: Stepped, toolstack: Store) -> None:
    """The answer has the layers; params, sectors and the state that a frontend waits for are written, and the same
    worker serves on.
    """
    worker = serving.vbd().worker
    toolstack.watch(f"{PATH.backend}/state", "state")
    toolstack.events()
    answer = serving.ask(serving.vbd().orders.set_chain, "null:3G")
    for _ in range(3):
        serving.turn(0)
    keys = toolstack.dictionary(PATH.backend)

    assert ("null:3G", 3 << 30) == (answer["data"]["chain"], answer["data"]["layers"][0]["size"])
    assert ("null:3G", str(3 << 21), "4") == (keys["params"], keys["sectors"], keys["state"])
    assert [(f"{PATH.backend}/state", "state")] == toolstack.events()
    assert worker is serving.vbd().worker
    assert serving.vbd().handover.notes.get("swap") is None


def test_a_chain_that_does_not_fit_is_refused(serving: Stepped, toolstack: Store) -> None:
    """A chain that cannot be meant is refused at once, one that the worker refuses with its words; the keys stay."""
    orders = serving.vbd().orders
    with pytest.raises(ChainError, match="nosuch"):
        orders.set_chain("nosuch:x", lambda _: None)
    with pytest.raises(ConfigError):
        orders.set_chain("aio:relative", lambda _: None)

    assert {"error": "null:5G: it is too small"} == serving.ask(orders.set_chain, "null:5G")
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params")
    assert serving.vbd().handover.notes.get("swap") is None
    assert serving.vbd().device.error == ""


def test_one_chain_at_a_time(serving: Stepped) -> None:
    """A second order waits for nobody: it is refused until the first one has its answer."""
    orders = serving.vbd().orders
    answers: list[dict[str, Any]] = []
    orders.set_chain("null:3G", answers.append)
    with pytest.raises(ConfigError, match="another chain is just being put in"):
        orders.set_chain("null:4G", answers.append)
    serving.until(lambda: answers)

    assert "data" in serving.ask(orders.set_chain, "null:3G")


def test_what_cannot_be_asked_now_is_refused(stepped: Stepped, toolstack: Store) -> None:
    """A disk that is not in service can neither be given another chain nor another worker."""
    write_like_libxl(toolstack, params="null:2G")
    stepped.until(lambda: stepped.vbd().device.error and stepped.vbd().worker is None)
    orders = stepped.vbd().orders

    with pytest.raises(ConfigError, match="not in service: null: it is broken"):
        orders.set_chain("null:1G", lambda _: None)
    with pytest.raises(ConfigError, match="not in service"):
        orders.snapshot("/new", "qcow2", lambda _: None)
    with pytest.raises(ConfigError, match="only one in service"):
        orders.upgrade(lambda _: None)


def test_a_worker_that_dies_after_it_put_a_chain_in_is_followed_by_one_with_that_chain(
    serving: Stepped, toolstack: Store, lines: io.StringIO
) -> None:
    """What the guest may have written to the new chain is not lost: the journal says which one was in service."""
    answer = serving.ask(serving.vbd().orders.set_chain, "null:6G")
    serving.until(is_served(serving))
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:6G")

    assert "exit status 6 meanwhile" in answer["error"]
    assert "null:6G" == serving.vbd().device.layers[0].text
    assert "rejoining" in lines.getvalue()
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_worker_and_service_that_both_die_after_a_chain_was_put_in(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """The next service finds in the journal which chain was in service last, and makes params say so."""
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    serve(stepped, toolstack, guest)
    stepped.vbd().orders.set_chain("null:6G", lambda _: None)
    stepped.until(lambda: (stepped.vbd().handover.agreed() or ("",))[0] == "null:6G")
    stepped.leave()
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    with closing(stepped):
        stepped.until(is_served(stepped))

        assert "null:6G" == toolstack.read(f"{PATH.backend}/params") == stepped.vbd().device.layers[0].text
        assert stepped.vbd().handover.notes.get("swap") is None


def test_an_order_that_came_to_nothing_is_forgotten(serving: Stepped, toolstack: Store) -> None:
    """A worker that dies before it had put the chain in is followed by one with the old chain; when the toolstack asks
    for the other one later, and then for the old one again, it gets both.
    """
    vbd = serving.vbd()
    vbd.handover.note(swap={"from": "null:1G", "to": "null:7G"})
    serving.until(is_served(serving, kill(serving)))
    assert "null:1G" == vbd.device.layers[0].text
    for chain in ("null:7G", "null:1G"):
        toolstack.write(f"{PATH.backend}/params", chain)
        serving.until(lambda: vbd.device.layers and vbd.device.layers[0].text == chain)  # noqa: B023 - at once
        serving.until(is_served(serving))

        assert chain == toolstack.read(f"{PATH.backend}/params")


def test_an_image_is_put_over_the_guests(serving: Stepped, toolstack: Store) -> None:
    """The worker makes the new image and the chain with it is put in like any other one; who waits gets its layers, or
    the worker's words where there is no new image.
    """
    orders = serving.vbd().orders
    made = serving.ask(orders.snapshot, "/new", "qcow2")
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:7G")

    assert "null:7G" == made["data"]["chain"]
    assert {"error": "/full: no room for another image"} == serving.ask(orders.snapshot, "/full", "qcow2")
    with pytest.raises(ConfigError, match="no whole path"):
        orders.snapshot("new", "qcow2", lambda _: None)
    orders.snapshot("/new", "qcow2", lambda _: None)
    with pytest.raises(ConfigError, match="just being put in"):
        orders.snapshot("/newer", "qcow2", lambda _: None)


def test_a_policy_holds_for_the_next_worker_too(serving: Stepped, lines: io.StringIO) -> None:
    """What is given takes the place of what held for the same operations; without any the one that holds is told."""
    orders = serving.vbd().orders
    before = serving.ask(orders.set_policy, "")
    after = serving.ask(orders.set_policy, "write=retry 5 every 2s")
    serving.until(is_served(serving, kill(serving)))

    assert before != after == serving.ask(orders.set_policy, "")
    assert "write=retry 5 every 2s" in after["data"]
    assert f"policy={after['data']!r}" in lines.getvalue()
    with pytest.raises(ConfigError):
        orders.set_policy("nonsense", lambda _: None)


def test_another_process_takes_over(serving: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """After an upgrade another process serves the same rings; the answer comes when it does, and nothing is told as an
    error.
    """
    worker = serving.vbd().worker
    assert worker is not None
    answer = serving.ask(serving.vbd().orders.upgrade)
    successor = serving.vbd().worker

    assert {"data": "upgraded"} == answer
    assert successor is not None
    assert worker.pid != successor.pid
    assert "rejoining" in lines.getvalue()
    assert "<3>" not in lines.getvalue()
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_an_upgrade_of_a_disk_without_a_guest(stepped: Stepped, toolstack: Store) -> None:
    """Where nobody is connected the other process only opens the chain."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")

    assert {"data": "upgraded"} == stepped.ask(stepped.vbd().orders.upgrade)
    assert Phase.OPEN is stepped.vbd().device.phase


def test_an_upgrade_that_nobody_takes_over_is_told(serving: Stepped) -> None:
    """Whoever waits hears of it when there is no next worker any more."""
    vbd = serving.vbd()
    answers: list[dict[str, Any]] = []
    vbd.orders.upgrade(answers.append)
    while not answers:
        if vbd.device.phase is Phase.RESTING:
            serving.expire()
        if vbd.worker is not None and vbd.device.phase is not Phase.RETIRING:
            kill(serving)  # before it can be told to rejoin
        serving.turn()

    assert "7 in a row" in answers[0]["error"]


def test_whoever_waits_hears_that_the_disk_has_gone(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """No order is left without an answer."""
    serve(stepped, toolstack, guest, "null:4G")
    answers: list[dict[str, Any]] = []
    stepped.vbd().orders.pause(answers.append)
    toolstack.remove(PATH.backend)
    stepped.until(lambda: answers)

    assert "paused" in answers[0].get("data", "") or "let go" in answers[0]["error"]
