"""What operators order of a vbd in service, in a registry with fake workers."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from contextlib import closing
from itertools import count
from typing import Any

import pytest

from tests.supervisor.helpers import PATH, Kept, Stepped, offer_ring, write_like_libxl
from xenbackend import journal
from xenbackend.errors import ChainError, ConfigError
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd import phase
from xenbackend.supervisor.vbd.device import Phase
from xenbackend.supervisor.vbd.orders import BARRED_BY
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes

_NUMBERS = count(1)
REQUESTS: dict[str, dict[str, Any]] = {
    "set": {"chain": "null:3G"},
    "resize": {},
    "snapshot": {"file": "/new", "format": "qcow2"},
    "upgrade": {},
    "pause": {},
    "resume": {},
    "policy": {"policy": "write=retry 5 every 2s"},
    "measure": {"seconds": 1},
    "end_measure": {},
    "command": {"layer": "0", "command": "get"},
}


UNNAMED: dict[str, dict[str, Any]] = {"keep": {"file": "/kept"}, "drop": {"force": True}}  # these need an unnamed file


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
    stepped.until(lambda: stepped.vbd().device.sight.theirs == 4)
    return stepped


def begin(stepped: Stepped, verb: str, **request: Any) -> list[Answer]:
    """Give an order, and return a list that will hold its one answer."""
    answers: list[Answer] = []
    stepped.vbd().orders.give(verb, request, next(_NUMBERS), answers.append)
    return answers


def ask(stepped: Stepped, verb: str, **request: Any) -> Answer:
    """Give an order, wait for its answer and return it."""
    answers = begin(stepped, verb, **request)
    stepped.until(lambda: answers)
    return answers[0]


def is_served(stepped: Stepped, but: int = 0) -> Callable[[], bool]:
    """Return a condition: the guest is served by a process other than `but`."""
    vbd = stepped.vbd()
    return lambda: vbd.worker is not None and vbd.worker.pid != but and vbd.device.phase is Phase.SERVING


def kill(stepped: Stepped) -> int:
    """Kill the worker, and return its process number."""
    worker = stepped.vbd().worker
    assert worker is not None
    worker.kill("the test wants it")
    return worker.pid


def test_a_pause_holds_for_the_next_worker(serving: Stepped, lines: io.StringIO) -> None:
    """A disk that an administrator paused stays paused when its worker dies, until it is resumed."""
    paused = ask(serving, "pause")
    serving.until(is_served(serving, kill(serving)))
    again = lines.getvalue()
    resumed = ask(serving, "resume")
    serving.until(is_served(serving, kill(serving)))

    assert (Answer(Code.OK, {"paused": True}), Answer(Code.OK, {"paused": False})) == (paused, resumed)
    assert "paused=True" in again
    assert "paused=False" in lines.getvalue()[len(again) :]


def test_who_paused_a_disk_first_is_known(serving: Stepped) -> None:
    """A second pause succeeds, but the disk stays paused by the first administrator; after a resume the next one
    counts.
    """
    codes = [ask(serving, "pause", by=by).code for by in ("first", "second")]
    first = serving.vbd().orders.paused_by
    ask(serving, "resume")
    ask(serving, "pause", by="second")

    assert ([Code.OK, Code.OK], "first", "second") == (codes, first, serving.vbd().orders.paused_by)


def test_a_detach_is_done_when_the_disk_is_over(serving: Stepped, toolstack: Store) -> None:
    """A detach ends when the disk is gone, after the toolstack has removed the node. It excludes no other order, not
    even another detach.
    """
    answers = [*begin(serving, "detach"), *begin(serving, "detach")]
    waiting = [each.verb for each in serving.vbd().orders.under_way]
    toolstack.remove(PATH.frontend)
    toolstack.remove(PATH.backend)
    told: list[Answer] = []
    serving.vbd().orders.give("detach", {}, next(_NUMBERS), told.append)
    serving.until(lambda: not serving.registry.vbds)

    assert ([], ["detach", "detach"], [Code.OK]) == (answers, waiting, [each.code for each in told])


def test_a_pause_without_a_worker_is_one_all_the_same(
    serving: Stepped, toolstack: Store, guest: Store, lines: io.StringIO
) -> None:
    """A pause without a worker is answered at once, because nothing is in flight, and holds for the next worker."""
    guest.write(f"{PATH.frontend}/state", "6")
    serving.until(lambda: toolstack.read(f"{PATH.backend}/state") == "6")
    assert serving.vbd().worker is None

    assert [Answer(Code.OK, {"paused": True})] == begin(serving, "pause")
    guest.write(f"{PATH.frontend}/state", "1")
    serving.until(lambda: serving.vbd().device.phase is Phase.OPEN)
    assert "paused=True" in lines.getvalue()


def test_resuming_forgives_everything(serving: Stepped) -> None:
    """After `resume` a failed flush in the journal does not stop the next worker."""
    vbd = serving.vbd()
    vbd.handover.poison(5)
    while vbd.device.phase is not Phase.NONE:
        if vbd.device.phase is Phase.RESTING:
            serving.expire()
        elif vbd.worker is not None:
            kill(serving)
        serving.turn()
    assert "7 in a row" in vbd.device.error
    ask(serving, "resume")
    forgiven = journal.poisoned(vbd.handover.page)
    serving.until(is_served(serving))

    assert (0, "") == (forgiven, vbd.device.error)


def test_another_chain_is_put_in(serving: Stepped, toolstack: Store) -> None:
    """The answer to `set` has the layers. The keys params, sectors and state are written, as a frontend waits for the
    state, and the same worker goes on.
    """
    worker = serving.vbd().worker
    toolstack.watch(f"{PATH.backend}/state", "state")
    toolstack.events()
    answer = ask(serving, "set", chain="null:3G")
    for _ in range(3):
        serving.turn(0)
    keys = toolstack.dictionary(PATH.backend)

    assert (Code.OK, "null:3G", 3 << 30) == (answer.code, answer.data["chain"], answer.data["layers"][0]["size"])
    assert ("null:3G", str(3 << 21), "4") == (keys["params"], keys["sectors"], keys["state"])
    assert [(f"{PATH.backend}/state", "state")] == toolstack.events()
    assert worker is serving.vbd().worker
    assert serving.vbd().handover.notes.exchange is None


@pytest.mark.parametrize(("verb", "request_"), [("resize", {}), ("set", {"chain": "null:3G"})])
def test_what_is_done_is_in_the_ledger_first(serving: Stepped, verb: str, request_: dict[str, Any]) -> None:
    """The ledger closes an order before it is answered, so that a service that dies in between leaves an order that has
    ended.
    """
    ledger, codes = serving.context.ledger, []
    number = ledger.open(verb, "5/xvda", {}, {})
    serving.vbd().orders.give(verb, request_, number, lambda _: codes.append(ledger.entries()[-1]["code"]))
    serving.until(lambda: codes)

    assert (["ok"], None) == (codes, serving.vbd().handover.notes.exchange)


def test_an_order_that_is_given_meanwhile_is_no_matter(serving: Stepped, toolstack: Store) -> None:
    """If another order to the worker crosses its report of an exchange, that is no breach, and the exchange is done."""
    worker = serving.vbd().worker
    answers = begin(serving, "set", chain="null:3G")
    serving.vbd().link.order(messages.Report)
    serving.until(lambda: answers)
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:3G")

    assert (Code.OK, "null:3G") == (answers[0].code, answers[0].data["chain"])
    assert (worker, 0) == (serving.vbd().worker, serving.fleet.breaches)


def test_a_worker_that_says_it_has_done_what_it_has_not_is_replaced(serving: Stepped, toolstack: Store) -> None:
    """A worker that falsely reports an exchange as done is replaced. The order fails, the former chain stays in
    service, and nothing is left under way.
    """
    vbd = serving.vbd()
    worker = vbd.worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    answers = begin(serving, "set", chain="null:3G")
    vbd.link._take(messages.Reply(vbd.link._last, Code.OK))
    serving.until(is_served(serving, worker.pid))

    assert [(Code.FAILED, "null:1G")] == [(each.code, each.data["chain"]) for each in answers]
    assert ([], None, 1) == (vbd.orders.under_way, vbd.handover.notes.exchange, serving.fleet.breaches)
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params") == vbd.device.layers[0].text


@pytest.mark.parametrize("verb", ["set", "snapshot", "pause", "policy"])
def test_an_order_over_which_a_fault_of_ours_is_met_has_one_answer(
    serving: Stepped, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """An order whose handling raises an exception gets one answer, is no longer under way, and excludes nothing."""
    vbd = serving.vbd()
    answers = begin(serving, verb, **REQUESTS[verb])
    with monkeypatch.context() as patch:
        patch.setattr(vbd.orders, "chain_data", fail)
        patch.setattr(vbd.orders, "_paused", fail)
        patch.setattr(vbd.orders, "_done_or_noted", fail)
        serving.until(lambda: answers)

    assert [Code.BUG] == [each.code for each in answers]
    assert Code.OK is ask(serving, "set", chain="null:1G").code
    assert 1 == len(serving.bugs)
    serving.bugs.clear()


def test_a_fault_when_an_order_is_given_leaves_nothing_under_way(
    serving: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If giving an order raises an exception, the caller gets it, and the order is not under way."""
    with monkeypatch.context() as patch:
        patch.setattr(serving.vbd().link, "ask", fail)
        with pytest.raises(ZeroDivisionError):
            begin(serving, "set", chain="null:3G")

    assert [] == serving.vbd().orders.under_way


def fail(*_: object, **__: object) -> None:
    """Raise an exception, as a bug would."""
    raise ZeroDivisionError


def test_a_chain_that_does_not_fit_is_refused(serving: Stepped, toolstack: Store) -> None:
    """An invalid chain is refused at once, one that the worker refuses with the worker's sentence; the keys stay."""
    with pytest.raises(ChainError, match="nosuch"):
        begin(serving, "set", chain="nosuch:x")
    for wrong in ({"chain": "aio:relative"}, {}, {"chain": 5}):
        with pytest.raises(ConfigError):
            begin(serving, "set", **wrong)
    answer = ask(serving, "set", chain="null:5G")

    assert (Code.INVALID, "null:5G: it is too small") == (answer.code, answer.sentence)
    assert "null:1G" == answer.data["chain"] == toolstack.read(f"{PATH.backend}/params")
    assert serving.vbd().handover.notes.exchange is None
    assert serving.vbd().device.error == ""


def test_a_dry_run_changes_nothing(serving: Stepped, toolstack: Store) -> None:
    """The answer has the layers before and after; the chain in service stays, and no exchange is noted."""
    answer = ask(serving, "set", chain="null:3G", dry_run=True)

    assert (Code.OK, "null:1G") == (answer.code, answer.data["chain"])
    assert (["null:1G"], ["null:3G"]) == (answer.data["before"], answer.data["after"])
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params")


@pytest.mark.parametrize("verb", REQUESTS)
def test_orders_that_exclude_each_other(serving: Stepped, verb: str) -> None:
    """Orders exclude each other exactly as the table says: the second one is refused with the first one's name and
    number. Each gets one answer, and the first is not affected.
    """
    assert {*REQUESTS, *UNNAMED, "detach"} == set(BARRED_BY)  # the end of a disk excludes nothing
    for other, request in REQUESTS.items():
        first = begin(serving, verb, **REQUESTS[verb])
        is_under_way = not first  # else it is done, and excludes nothing
        second = begin(serving, other, **request)
        is_refused = [each.code for each in second] == [Code.BUSY]
        serving.until(lambda: first and second)  # noqa: B023 - at once

        assert is_refused == (is_under_way and verb in BARRED_BY[other]), other
        assert [Code.OK] == [each.code for each in first], other
        assert is_refused == (f"{verb} is under way, order " in second[0].sentence), other
        assert not is_refused or second[0].data["chain"], other
        serving.until(is_served(serving))


@pytest.mark.parametrize("verb", UNNAMED)
def test_what_is_done_with_an_unnamed_file_is_an_exchange(
    stepped: Stepped, toolstack: Store, guest: Store, verb: str
) -> None:
    """`keep` and `drop` count as exchanges: they and other exchanges exclude each other, and their answers have the
    chain then in service.
    """
    serve(stepped, toolstack, guest, "log:|cow:block=8K|null:1G")
    answers = begin(stepped, verb, **UNNAMED[verb])
    refused = begin(stepped, "set", chain="null:3G")
    stepped.until(lambda: answers)
    wanted = {"keep": "log:|cow:/kept|null:1G", "drop": "log:|cow:block=8K|null:1G"}

    assert [Code.BUSY] == [each.code for each in refused]
    assert [(Code.OK, wanted[verb])] == [(each.code, each.data["chain"]) for each in answers]
    assert wanted[verb] == stepped.vbd().chain_in_service()
    answers = begin(stepped, "set", chain="cow:|null:3G")
    refused = begin(stepped, verb, **UNNAMED[verb])
    stepped.until(lambda: answers)
    assert [Code.OK, Code.BUSY] == [each.code for each in (*answers, *refused)]


@pytest.mark.parametrize(
    ("verb", "request_", "sentence"),
    [
        ("keep", {"file": "/kept"}, "the disk has no unnamed file: in null:1G there is no cow: without a file"),
        ("keep", {"file": "kept"}, "is not an absolute path"),
        ("drop", {"force": True}, "the disk has no unnamed file"),
        ("drop", {}, "a guest uses the disk, and would find another content"),
    ],
)
def test_nothing_is_done_with_a_disk_that_has_no_unnamed_file(
    serving: Stepped, verb: str, request_: dict[str, Any], sentence: str
) -> None:
    """`keep` and `drop` are refused before anything is changed if there is no unnamed file, and `drop` without force if
    a guest uses the disk.
    """
    with pytest.raises(ConfigError, match=sentence):
        begin(serving, verb, **request_)
    assert [] == serving.vbd().orders.under_way


def test_a_snapshot_that_fails_ends_no_set(serving: Stepped, toolstack: Store) -> None:
    """A failed snapshot is answered as such, and does not affect a later exchange."""
    failed = begin(serving, "snapshot", file="/full")
    refused = begin(serving, "set", chain="null:3G")
    serving.until(lambda: failed and refused)
    done = ask(serving, "set", chain="null:3G")
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:3G")

    assert (Code.FAILED, Code.BUSY, Code.OK) == (failed[0].code, refused[0].code, done.code)
    assert ("/full: no room for another image", "null:1G") == (failed[0].sentence, failed[0].data["chain"])


def test_a_snapshot_is_no_way_to_another_file(serving: Stepped, toolstack: Store) -> None:
    """S5: a worker that names another image than the one that was asked for is replaced."""
    pid = serving.vbd().worker.pid
    answer = ask(serving, "snapshot", file="/lies")
    serving.until(is_served(serving, pid))

    assert (Code.FAILED, "null:1G", 1) == (answer.code, answer.data["chain"], serving.fleet.breaches)
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params") == serving.vbd().handover.notes.chain


def test_a_snapshot_of_the_images_own_changes_no_chain(serving: Stepped, toolstack: Store) -> None:
    """S5: a snapshot within the image does not change the chain, whatever its worker replies."""
    answer = ask(serving, "snapshot", file="@then")

    assert (Code.OK, "null:1G", 0) == (answer.code, answer.data["chain"], serving.fleet.breaches)
    assert "null:1G" == toolstack.read(f"{PATH.backend}/params") == serving.vbd().handover.notes.chain


def test_what_cannot_be_asked_now_is_refused(stepped: Stepped, toolstack: Store) -> None:
    """Orders that need a worker are refused for a disk that is not in service, with the reason."""
    write_like_libxl(toolstack, params="null:2G")
    stepped.until(lambda: stepped.vbd().device.error and stepped.vbd().worker is None)

    for verb, sentence in (("set", "not in service: null: it is broken"), ("snapshot", "not in service"),
                           ("resize", "not in service"), ("upgrade", "not in service: null: it is broken"),
                           ("command", "has no worker: null: it is broken")):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            begin(stepped, verb, **REQUESTS[verb])
    assert [] == stepped.vbd().orders.under_way


def test_a_worker_that_dies_after_it_put_a_chain_in_is_followed_by_one_with_that_chain(
    serving: Stepped, toolstack: Store, lines: io.StringIO
) -> None:
    """If a worker dies after an exchange, its successor serves the new chain, by the journal, so that nothing that the
    guest wrote is lost; the order is answered as done.
    """
    answer = ask(serving, "set", chain="null:6G")
    serving.until(is_served(serving))
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:6G")

    assert (Code.OK, "null:6G") == (answer.code, answer.data["chain"])
    assert "null:6G" == serving.vbd().device.layers[0].text
    assert "rejoining" in lines.getvalue()
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_worker_and_service_that_both_die_after_a_chain_was_put_in(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If worker and service die after an exchange, the next service finds the new chain in the journal, and writes it
    to params.
    """
    monkeypatch.setitem(phase.LIMIT_S, phase.Phase.ADOPTING, 0.5)  # the worker is dead, which its heir is not told
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    serve(stepped, toolstack, guest)
    answers = begin(stepped, "set", chain="null:6G")

    def is_put_in() -> bool:
        agreed = stepped.vbd().handover.agreed()
        return agreed is not None and agreed.chain == "null:6G"

    stepped.until(is_put_in)
    stepped.leave()
    stepped = Stepped(xenstored.address, Settings(), keeper=kept.keeper())
    with closing(stepped):
        stepped.until(is_served(stepped))
        stepped.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:6G")

        assert "null:6G" == stepped.vbd().device.layers[0].text
        assert stepped.vbd().handover.notes.exchange is None
        assert [Code.UNDER_WAY] == [each.code for each in answers] or [Code.OK] == [each.code for each in answers]


def test_an_order_that_came_to_nothing_is_forgotten(serving: Stepped, toolstack: Store) -> None:
    """If a worker dies before it has made the exchange, the former chain is served and the order forgotten: the
    toolstack can name either chain afterwards.
    """
    vbd = serving.vbd()
    worker = kill(serving)  # it cannot take the question any more
    answer = ask(serving, "set", chain="null:7G")
    serving.until(is_served(serving, worker))
    assert (Code.FAILED, "null:1G") == (answer.code, answer.data["chain"])
    assert "null:1G" == vbd.device.layers[0].text
    for chain in ("null:7G", "null:1G"):
        toolstack.write(f"{PATH.backend}/params", chain)
        serving.until(lambda: vbd.device.layers and vbd.device.layers[0].text == chain)  # noqa: B023 - at once
        serving.until(is_served(serving))

        assert chain == toolstack.read(f"{PATH.backend}/params")


def test_another_chain_is_put_in_where_no_worker_is_left(serving: Stepped, toolstack: Store) -> None:
    """With --replace an administrator can have a waiting guest served by another chain. If that cannot be opened, the
    answer says that the disk now waits for it, and yet another can be named.
    """
    vbd = serving.vbd()
    while vbd.device.reason != "given-up":
        if vbd.device.phase is Phase.RESTING:
            serving.expire()
        elif vbd.worker is not None:
            kill(serving)
        serving.turn(0.02)
    for words in ({}, {"replace": True, "dry_run": True}):
        with pytest.raises(ConfigError, match=r"the disk is not in service: .* in a row"):
            begin(serving, "set", chain="null:7G", **words)
    former = vbd.chain_in_service()
    failed = ask(serving, "set", chain="null:2G", replace=True)
    serving.until(lambda: vbd.worker is None)
    answer = ask(serving, "set", chain="null:7G", replace=True)
    serving.until(is_served(serving))
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:7G")

    assert "null:1G" == former
    assert (Code.FAILED, "null:2G") == (failed.code, failed.data["chain"])
    assert "the disk now waits for null:2G: null: it is broken" == failed.sentence
    assert (Code.OK, "null:7G", "") == (answer.code, answer.data["chain"], vbd.device.error)
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_an_image_is_put_over_the_guests(serving: Stepped, toolstack: Store) -> None:
    """For a snapshot the worker makes the new image, and the chain with it is put in like any other."""
    made = ask(serving, "snapshot", file="/new", format="qcow2")
    serving.until(lambda: toolstack.read(f"{PATH.backend}/params") == "qcow2:/new")

    assert (Code.OK, "qcow2:/new") == (made.code, made.data["chain"])
    with pytest.raises(ConfigError, match="not an absolute path"):
        begin(serving, "snapshot", file="new")


def test_a_policy_holds_for_the_next_worker_too(serving: Stepped, lines: io.StringIO) -> None:
    """A policy replaces the former one for the same operations, and holds for the next worker. An order without one
    returns the policy in force.
    """
    before = ask(serving, "policy")
    after = ask(serving, "policy", policy="write=retry 5 every 2s")
    serving.until(is_served(serving, kill(serving)))

    assert before != after == ask(serving, "policy")
    assert "write=retry 5 every 2s" in after.data["policy"]
    assert f"policy={after.data['policy']}" in lines.getvalue().rpartition("opening")[2]
    with pytest.raises(ConfigError):
        begin(serving, "policy", policy="nonsense")


def test_a_layer_is_asked(serving: Stepped) -> None:
    """A layer's answer and code are returned as they are; arguments that are not texts are refused."""
    answer = ask(serving, "command", layer="0", command="get", arguments=["a"])
    refused = ask(serving, "command", layer="0", command="nosuch")

    assert (Code.OK, "0 ['a']", Code.INVALID) == (answer.code, answer.data, refused.code)
    with pytest.raises(ConfigError, match="list of texts"):
        begin(serving, "command", layer="0", command="get", arguments=[1])


def test_another_process_takes_over(serving: Stepped, toolstack: Store, lines: io.StringIO) -> None:
    """After an upgrade another process serves the same rings, and then the order is answered. No error is logged."""
    worker = serving.vbd().worker
    assert worker is not None
    answer = ask(serving, "upgrade")
    successor = serving.vbd().worker

    assert successor is not None
    assert Answer(Code.OK, {"worker": successor.pid}) == answer
    assert worker.pid != successor.pid
    assert "rejoining" in lines.getvalue()
    assert "<3>" not in lines.getvalue()
    assert "4" == toolstack.read(f"{PATH.backend}/state")


def test_a_worker_that_was_asked_to_end_is_no_restart(serving: Stepped) -> None:
    """`restarts` counts deaths, and not upgrades."""
    vbd = serving.vbd()
    assert Code.OK is ask(serving, "upgrade").code
    assert 0 == vbd.handover.notes.restarts
    serving.until(is_served(serving, kill(serving)))

    assert 1 == vbd.handover.notes.restarts


def test_an_upgrade_of_a_disk_without_a_guest(stepped: Stepped, toolstack: Store) -> None:
    """Without a guest the new process only opens the chain."""
    write_like_libxl(toolstack)
    stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")

    assert Code.OK is ask(stepped, "upgrade").code
    assert Phase.OPEN is stepped.vbd().device.phase


def test_an_upgrade_that_nobody_takes_over_is_told(serving: Stepped) -> None:
    """An upgrade fails if in the end no worker is left."""
    vbd = serving.vbd()
    answers = begin(serving, "upgrade")
    while not answers:
        if vbd.device.phase is Phase.RESTING:
            serving.expire()
        if vbd.worker is not None and vbd.device.phase is not Phase.RETIRING:
            kill(serving)  # before it can be told to rejoin
        serving.turn()

    assert Code.FAILED is answers[0].code


def test_whoever_waits_hears_that_the_disk_has_gone(stepped: Stepped, toolstack: Store, guest: Store) -> None:
    """If the disk goes away, orders under way are answered."""
    serve(stepped, toolstack, guest, "null:4G")
    answers = begin(stepped, "pause")
    toolstack.remove(PATH.backend)
    stepped.until(lambda: answers)

    assert answers[0].code in (Code.OK, Code.GONE)


@pytest.mark.parametrize("verb", ["pause", "resume", "policy"])
def test_the_next_service_goes_on_with_what_can_be_ordered_twice(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, verb: str
) -> None:
    """An order that can be repeated is finished by the next service: it may have been noted already, so it must not be
    called undone, and nothing else would tell the worker.
    """
    former = serve(Stepped(xenstored.address, Settings(), keeper=kept.keeper()), toolstack, guest)
    if verb == "resume":
        assert Code.OK is ask(former, "pause").code
    told = begin(former, verb, **REQUESTS[verb])
    number = former.vbd().orders.under_way[0].number
    former.leave()
    answers: list[Answer] = []
    with closing(Stepped(xenstored.address, Settings(), keeper=kept.keeper())) as stepped:
        stepped.until(is_served(stepped))
        stepped.vbd().orders.go_on(verb, REQUESTS[verb].get("policy", ""), number, answers.append)
        stepped.until(lambda: answers)
        after = stepped.vbd().handover.notes.paused is not None

    assert [(Code.UNDER_WAY, "5/xvda: the service is being replaced; ask again")] == [
        (each.code, each.sentence) for each in told
    ]
    assert [Code.OK] == [each.code for each in answers]
    assert (verb == "pause") == after


@pytest.mark.parametrize("verb", ["pause", "detach"])
def test_an_order_for_a_former_disk_is_not_carried_out_on_another_one(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept, verb: str
) -> None:
    """If a disk was detached, and another one attached in its place, while no service was there, the next service does
    not carry out on that one what was ordered for the former one, nor wait for its end. Orders for that one go on.
    """
    former = serve(Stepped(xenstored.address, Settings(), keeper=kept.keeper()), toolstack, guest)
    number = former.context.ledger.open(verb, PATH.disk, {}, {})
    former.leave()
    toolstack.remove(PATH.backend)
    write_like_libxl(toolstack)
    answers: list[Answer] = []
    with closing(Stepped(xenstored.address, Settings(), keeper=kept.keeper())) as stepped:
        stepped.until(lambda: toolstack.read_optional(f"{PATH.backend}/hotplug-status") == "connected")
        later = stepped.context.ledger.open(verb, PATH.disk, {}, {})
        stepped.vbd().orders.go_on(verb, "", number, answers.append)
        is_paused = stepped.vbd().orders.paused_by
        is_under_way = [each.number for each in stepped.vbd().orders.under_way]
        stepped.vbd().orders.go_on(verb, "", later, answers.append)
        begun = [each.number for each in stepped.vbd().orders.under_way]

    assert ([Code.GONE], "", []) == ([each.code for each in answers[:1]], is_paused, is_under_way)
    assert [later] == begun


def test_the_next_service_knows_which_exchange_was_the_last(
    xenstored: Xenstored, toolstack: Store, guest: Store, kept: Kept
) -> None:
    """If a service dies after an exchange and before the order is closed, the next one closes that order as done, and
    no other one.
    """
    former = serve(Stepped(xenstored.address, Settings(), keeper=kept.keeper()), toolstack, guest)
    before = former.vbd().handover.notes.exchanged_by
    assert Code.OK is ask(former, "set", chain="null:3G").code
    number = former.vbd().handover.notes.exchanged_by
    former.leave()
    answers: list[Answer] = []
    with closing(Stepped(xenstored.address, Settings(), keeper=kept.keeper())) as stepped:
        stepped.until(is_served(stepped))
        for each in (number, number + 1):
            stepped.vbd().orders.go_on("set", "null:3G", each, answers.append)

    assert (0, [Code.OK, Code.GONE]) == (before, [each.code for each in answers])
    assert ["null:3G", "null:3G"] == [each.data["chain"] for each in answers]


@pytest.mark.parametrize(("ended_at", "lasted"), [(10.50049, 0.5), (12.5, 2.0)])
def test_how_long_was_measured(
    serving: Stepped, monkeypatch: pytest.MonkeyPatch, ended_at: float, lasted: float
) -> None:
    """A measurement lasts as long as was ordered; one that ended early, from the order to its end, in milliseconds."""
    monkeypatch.setattr(serving.vbd().orders, "_now", iter((10.0, ended_at)).__next__)

    assert lasted == ask(serving, "measure", seconds=2).data["seconds"]
