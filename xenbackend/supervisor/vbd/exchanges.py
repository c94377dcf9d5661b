"""How the exchange of one vbd's chain ends: by what the worker says, or by the journal of one that has died.

Must not ask for one, nor answer an order that this service was given: `orders` does both.
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
    """One vbd's, one at a time: `handover.notes.exchange`."""

    def __init__(self, handover: Handover, orders: Orders, ledger: Ledger, handle: Callable[[Exchanged], None]) -> None:
        """`handle` lets the automaton know of a chain that took another one's place, so that ``params`` follows."""
        self._handover = handover
        self._orders = orders
        self._ledger = ledger
        self._handle = handle

    def believes(self, standing: Standing) -> bool:
        """Return whether the chain can be that a worker says is in service; if it is the one to be put in, it is."""
        notes = self._handover.notes
        if notes.exchange is not None and standing.chain == notes.exchange.chain != notes.chain:
            self.end(is_done=True)
            self.follow()
            return True
        return standing.chain == notes.chain or standing.stage is Stage.IDLE

    def conclude(self, standing: Standing) -> None:
        """Take note that the worker has done with what an earlier service asked for; what is done `believes` has seen.

        Unless it is the same chain once more.
        """
        exchange = self._handover.notes.exchange
        self.end(is_done=exchange is not None and exchange.chain == standing.chain and self._handover.has_exchanged())

    def settle(self) -> bool:
        """Find out in the journal whether a worker had put the chain of the exchange under way in, and return that."""
        is_done = self._handover.has_exchanged()
        self.end(is_done=is_done)
        self.follow()
        return is_done

    def follow(self) -> None:
        """Let ``params`` follow the chain in service, where it may not have done so yet."""
        notes = self._handover.notes
        if notes.stale_params:
            self._handle(Exchanged(tuple(notes.stale_params), notes.chain))

    def end(self, *, is_done: bool) -> None:
        """Take note of how the exchange under way has ended, if there is one.

        Its order ends in the ledger: at once where it is done, so that a service that dies now leaves no doubt; else
        where an earlier service had begun it, and did not live to see that.
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
