"""Waits for orders that may be ended by a later service than the one that took them.

Must not give an order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from xenbackend.client.results import Disk, Order
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import Gone, ServiceError, UnderWay, Unreachable, Waiting
from xenbackend.protocol.codes import Code

LOOK_S = 0.25  # between two looks for the end of an order
RETURN_S = 30.0  # the longest absence of a service that is being restarted
# Orders whose answers have nothing that the ledger and `status` do not have.
FOLLOWED = ("set", "snapshot", "resize", "keep", "drop", "pause", "resume", "upgrade")


def follow(
    orders: Callable[[], list[Order]],
    disks: Callable[[], list[Disk]],
    token: str,
    problem: UnderWay,
    waiting: Waiting | None,
) -> Answer:
    """Return the answer to the order with this token, which the service has left to the next one.

    Raises: ServiceError, if the order failed; Gone, if it was done and the disk has gone since; `problem`, if the
    service does not know the order, or no service comes.
    """
    begun = time.monotonic()
    while True:
        try:
            known, served = orders(), disks()
        except ServiceError as silence:
            is_away = isinstance(silence, Unreachable | Gone)
            if not is_away or time.monotonic() - begun >= RETURN_S:
                raise problem from None
        else:
            order = next((each for each in known if each.token == token), None)
            if order is None:
                raise problem
            if order.ended is not None:
                return _answer(order, served)
        _pause(begun, waiting)


def wait_for(order: Callable[[], Order], timeout_s: float | None, waiting: Waiting | None) -> Order:
    """Return an order once it has ended. Raises: UnderWay after `timeout_s`; Unreachable, Gone, if no service comes."""
    begun = seen = time.monotonic()
    found: Order | None = None
    while True:
        now = time.monotonic()
        try:
            found = order()
            seen = now
        except (Unreachable, Gone):
            if now - seen >= RETURN_S:
                raise
        if found is not None and found.ended is not None:
            return found
        if timeout_s is not None and now - begun >= timeout_s:
            where = f", order {found.number}" if found is not None else ""
            raise ServiceError(
                Answer(
                    Code.UNDER_WAY,
                    sentence=f"it is still under way after {timeout_s:g} s{where}",
                    order=None if found is None else found.number,
                )
            )
        _pause(begun, waiting)


def _pause(begun: float, waiting: Waiting | None) -> None:
    time.sleep(LOOK_S)
    if waiting is not None:
        waiting(time.monotonic() - begun)


def _answer(order: Order, served: list[Disk]) -> Answer:
    """Return an answer made of an order's entry and what is in service now. Raises: ServiceError, if it failed."""
    data = _of_disk(order, served)
    if order.code is not Code.OK:
        raise ServiceError(Answer(order.code, data, order.error, order.number))
    if not data:
        sentence = f"order {order.number} was done, and {order.vbd} is not in service any more"
        raise ServiceError(Answer(Code.GONE, data, sentence, order.number))
    return Answer(order.code, data, order=order.number)


def _of_disk(order: Order, served: list[Disk]) -> dict[str, Any]:
    for disk in served:
        if disk.vbd == order.vbd:
            return {"chain": disk.chain, "layers": disk.values["layers"], "worker": disk.worker}
    return {}
