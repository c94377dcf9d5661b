"""Finds out how an exchange of one vbd's chain has ended: from what the worker says, or from a dead worker's journal.

Must not begin an exchange, nor answer an order that this service was given: `orders` does both.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage, Standing
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.vbd.events import Exchanged
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.orders import Orders


class Exchanges:
    """The exchanges of one vbd, one at a time; `handover.notes.exchange` is the one under way."""

    def __init__(self, handover: Handover, orders: Orders, ledger: Ledger, handle: Callable[[Exchanged], None]) -> None:
        """`handle` tells the automaton that another chain is in service, so that ``params`` follows."""
        self._handover = handover
        self._orders = orders
        self._ledger = ledger
        self._handle = handle

    def believes(self, standing: Standing) -> bool:
        """Return whether the worker's chain is a possible one. If it is the one to be put in, the exchange is done."""
        notes = self._handover.notes
        if notes.exchange is not None and standing.chain == notes.exchange.chain != notes.chain:
            self.end(is_done=True)
            self.follow()
            return True
        return standing.chain == notes.chain or standing.stage is Stage.IDLE

    def conclude(self, standing: Standing) -> None:
        """Note how an exchange that an earlier service asked for has ended: the adopted worker has answered our order.

        `believes` has already ended one that put another chain in. So this one was not done, or was for the same chain.
        """
        exchange = self._handover.notes.exchange
        self.end(is_done=exchange is not None and exchange.chain == standing.chain and self._handover.has_exchanged())

    def settle(self) -> bool:
        """Find out from the journal whether a worker carried out the exchange under way, note it, and return it."""
        is_done = self._handover.has_exchanged()
        self.end(is_done=is_done)
        self.follow()
        return is_done

    def follow(self) -> None:
        """Have ``params`` follow the chain in service, if it may not have done so yet."""
        notes = self._handover.notes
        if notes.stale_params:
            self._handle(Exchanged(tuple(notes.stale_params), notes.chain))

    def end(self, *, is_done: bool) -> None:
        """Note how the exchange under way has ended, if there is one.

        If it is done, its order is closed in the ledger at once: a service that dies now leaves no doubt.
        If not, its order is closed here only if it is an earlier service's, which did not live to do so.
        """
        exchange = self._handover.notes.exchange
        if exchange is None:
            return
        if is_done:
            self._ledger.close(exchange.order, Answer(Code.OK, {"chain": exchange.chain}))
            self._handover.exchange_is_done()
            return
        if exchange.order not in [each.number for each in self._orders.under_way]:
            chain = self._handover.notes.chain
            sentence = f"the service was replaced meanwhile; {chain} is in service"
            self._ledger.close(exchange.order, Answer(Code.FAILED, {"chain": chain}, sentence))
        self._handover.exchange_is_not_done()
