"""Changes to the product that are known to be wrong, each of which the model must find.

Must not be in force longer than a run. Most of them were faults of ours once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from xenbackend.blkif.handshake import XenbusState
from xenbackend.protocol import messages
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.main import Service
from xenbackend.supervisor.vbd import orders
from xenbackend.supervisor.vbd.aims import Aims
from xenbackend.supervisor.vbd.events import Ended, Exchanged, Stop
from xenbackend.supervisor.vbd.exchanges import Exchanges
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.link import Link
from xenbackend.supervisor.vbd.orders import Order, Orders
from xenbackend.supervisor.vbd.sight import Sight
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.worker.connection import Connection
from xenbackend.worker.disk import Disk
from xenbackend.worker.stages import Stages

Change = tuple[Any, str, Any]


def _every_reply_answers_every_question() -> list[Change]:
    def hear(self: Link, reply: messages.Reply) -> None:
        asked, self._asked = self._asked, {}
        for number, then in asked.items():
            then(replace(reply, id=number))

    return [(Link, "_hear_reply", hear)]


def _the_race() -> list[Change]:
    """`snapshot` while a `set` is under way: a refusal ends both, and erases what was noted of the exchange."""
    bars = {**orders.BARRED_BY, "snapshot": frozenset({"snapshot"}), "set": frozenset({"set"})}

    def branched(self: Orders, order: Order, file: str, reply: messages.Reply) -> None:
        if reply.code is Code.OK:
            branch(self, order, file, reply)
            return
        self._vbd.handover.note(exchange=None)
        for each in self.under_way:
            if each.verb in ("set", "snapshot"):
                self._answer(each, Answer(reply.code, sentence=reply.sentence, data=self.chain_data()))

    branch = Orders._branched
    return [(orders, "BARRED_BY", bars), (Orders, "_branched", branched)]


def _any_chain_in_a_standing_is_believed() -> list[Change]:
    stands = Vbd.stands

    def believe(self: Vbd, standing: messages.Standing, **named: Any) -> None:
        if standing.chain and standing.stage is not messages.Stage.IDLE:
            self.handover.note(chain=standing.chain)
        stands(self, standing, **named)

    return [(Vbd, "stands", believe)]


def _the_next_vbd_is_made_before_the_former_has_ended() -> list[Change]:
    handle = Vbd.handle

    def early(self: Vbd, event: Any) -> None:
        handle(self, event)
        if self.device.sight.is_over and not self.is_forgotten and self.worker is not None:
            self._on_forgotten(self)

    return [(Vbd, "handle", early)]


def _a_node_that_is_made_anew_is_the_same_vbd() -> list[Change]:
    return [(Sight, "_is_anothers", lambda *_: False)]


def _closed_is_written_before_the_worker_is_gone() -> list[Change]:
    state = Aims.state

    def early(self: Aims) -> XenbusState:
        return state(self) if self._sight.is_online or self.is_live() else XenbusState.CLOSED

    return [(Aims, "state", early)]


def _an_exchange_is_not_noted_before_it_begins() -> list[Change]:
    note = Handover.note

    def forget(self: Handover, **changes: Any) -> None:
        note(self, **{key: value for key, value in changes.items() if key != "exchange"})

    return [(Handover, "note", forget)]


def _params_do_not_follow() -> list[Change]:
    return [(Sight, "exchange", lambda *_: None)]


def _params_are_lost_over_two_exchanges() -> list[Change]:
    def exchange(self: Sight, exchanged: Exchanged) -> None:
        if not self.is_over:
            self._follows = frozenset(exchanged.stale_params[:1]), exchanged.chain
            self._read()

    return [(Sight, "exchange", exchange)]


def _the_journal_is_not_asked_what_a_dead_worker_had_done() -> list[Change]:
    return [(Handover, "_left", lambda _: None)]


def _a_pause_is_not_noted() -> list[Change]:
    note = Handover.note

    def forget(self: Handover, **changes: Any) -> None:
        note(self, **{key: value for key, value in changes.items() if key != "paused"})

    return [(Handover, "note", forget)]


def _a_resume_is_not_noted() -> list[Change]:
    note = Handover.note

    def forget(self: Handover, **changes: Any) -> None:
        note(self, **{key: value for key, value in changes.items() if key != "paused" or value is not None})

    return [(Handover, "note", forget)]


def _an_order_of_an_earlier_service_is_never_closed() -> list[Change]:
    end = Exchanges.end

    def forget(self: Exchanges, *, is_done: bool) -> None:
        with patch.object(Ledger, "close", lambda *_: None):
            end(self, is_done=is_done)

    return [(Exchanges, "end", forget)]


def _an_exchange_does_not_wait_for_what_is_in_flight() -> list[Change]:
    return [(Connection, "quiet", lambda *_: lambda done: done(0))]


def _a_chain_that_could_not_be_opened_is_in_service() -> list[Change]:
    exchange = Disk.exchange

    def forget(self: Disk, text: str) -> Any:
        try:
            return exchange(self, text)
        except Exception:
            return self.chain

    return [(Disk, "exchange", forget)]


def _a_snapshot_is_not_noted() -> list[Change]:
    swap = Orders._exchange

    def forget(self: Orders, order: Order, chain: str, **how: Any) -> None:
        swap(self, order, chain, **how)
        if order.verb == "snapshot":
            self._vbd.handover.note(exchange=None)

    return [(Orders, "_exchange", forget)]


def _an_order_is_given_to_a_service_that_stops() -> list[Change]:
    order = Service._order

    def give(self: Service, *arguments: Any) -> None:
        is_stopping, self._is_stopping = self._is_stopping, False
        try:
            order(self, *arguments)
        finally:
            self._is_stopping = is_stopping

    return [(Service, "_order", give)]


def _a_standing_of_an_earlier_order_is_passed_over() -> list[Change]:
    stands = Vbd.stands

    def hear(self: Vbd, standing: messages.Standing, *, is_last: bool) -> None:
        if is_last:
            stands(self, standing, is_last=True)

    return [(Vbd, "stands", hear)]


def _an_exchange_forgets_what_was_agreed_with_a_guest() -> list[Change]:
    return [(Stages, "_left", lambda _: None)]


def _a_stop_forgets_what_a_dead_worker_had_taken() -> list[Change]:
    handle = Vbd.handle

    def forget(self: Vbd, event: Any) -> None:
        handle(self, replace(event, is_unfinished=False) if isinstance(event, Stop | Ended) else event)

    return [(Vbd, "handle", forget)]


WRONG: dict[str, Callable[[], list[Change]]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _every_reply_answers_every_question,
        _the_race,
        _any_chain_in_a_standing_is_believed,
        _the_next_vbd_is_made_before_the_former_has_ended,
        _a_node_that_is_made_anew_is_the_same_vbd,
        _closed_is_written_before_the_worker_is_gone,
        _an_exchange_is_not_noted_before_it_begins,
        _params_do_not_follow,
        _params_are_lost_over_two_exchanges,
        _the_journal_is_not_asked_what_a_dead_worker_had_done,
        _a_pause_is_not_noted,
        _a_resume_is_not_noted,
        _an_order_of_an_earlier_service_is_never_closed,
        _an_exchange_does_not_wait_for_what_is_in_flight,
        _a_chain_that_could_not_be_opened_is_in_service,
        _a_snapshot_is_not_noted,
        _an_order_is_given_to_a_service_that_stops,
        _a_standing_of_an_earlier_order_is_passed_over,
        _an_exchange_forgets_what_was_agreed_with_a_guest,
        _a_stop_forgets_what_a_dead_worker_had_taken,
    )
}


@contextmanager
def made(change: str) -> Iterator[None]:
    """Make the change of this name within this context."""
    with ExitStack() as undo:
        for owner, name, value in WRONG[change]():
            undo.enter_context(patch.object(owner, name, value))
        yield
