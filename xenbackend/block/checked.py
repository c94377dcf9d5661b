"""The asserting layer: between all layers of a chain it detects which one breaks a rule of the driver contract.

Must not be in a production chain: it costs more than most drivers.
"""

from __future__ import annotations

from typing import Any

from xenbackend.block.driver import Filter, Geometry, NoOptions
from xenbackend.block.request import PENDING, Op, Request

_HAS_DATA = (Op.READ, Op.WRITE)
_ALIGNMENT = 512


class ContractError(AssertionError):
    """A layer broke a rule of the driver contract; the text names the rule and the layer."""


class Checked(Filter):
    """Asserts D1, D2, D6 and the fields of requests between two layers, called `upper` and `lower` in its errors."""

    name = "checked"

    def __init__(self, upper: str, lower: str, geometry: Geometry) -> None:
        super().__init__(NoOptions())
        self.upper = upper
        self.lower = lower
        self.geometry = geometry
        self._lent: dict[Request, tuple[Any, ...]] = {}

    def submit(self, batch: list[Request]) -> None:
        """Check what the upper layer lends, and pass it on."""
        self._demand(bool(batch), "D2", self.upper, "submitted an empty batch")
        for request in batch:
            self._demand(request not in self._lent, "D1", self.upper, f"submitted twice: {request!r}")
            self._demand(
                request.status == PENDING, "D1", self.upper, f"submitted a request that is not pending: {request!r}"
            )
            self._check_shape(request)
            self._lent[request] = _fields(request)
        super().submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Check what the lower layer gives back, and pass it on."""
        self._demand(bool(batch), "D2", self.lower, "completed an empty batch")
        for request in batch:
            fields = self._lent.pop(request, None)
            self._demand(fields is not None, "D1", self.lower, f"gave back a request that it did not hold: {request!r}")
            self._demand(fields == _fields(request), "D1", self.lower, f"altered {request!r}, lent as {fields}")
            self._demand(request.status >= 0, "D6", self.lower, f"gave back without a status: {request!r}")
        self.complete(batch)

    def close(self) -> None:
        """Check that nothing is in flight."""
        self._demand(not self._lent, "D1", self.lower, f"was closed while it held {list(self._lent)}")

    def _check_shape(self, request: Request) -> None:
        op, offset, length = request.op, request.offset, request.length
        fits = offset >= 0 and length >= 0 and offset + length <= self.geometry.size
        self._demand(fits, "Request", self.upper, f"went past {self.geometry.size}: {request!r}")
        aligned = not (offset | length) % _ALIGNMENT
        self._demand(aligned, "Request", self.upper, f"submitted a request that is not of whole sectors: {request!r}")
        held = sum(view.nbytes for view in request.iov)
        self._demand(held == (length if op in _HAS_DATA else 0), "Request", self.upper, f"{held} bytes: {request!r}")
        self._demand(
            length > 0 or op == Op.FLUSH, "Request", self.upper, f"submitted a request of no bytes: {request!r}"
        )
        alters = op in (Op.WRITE, Op.DISCARD)
        self._demand(not (alters and self.geometry.read_only), "Geometry", self.upper, f"read-only: {request!r}")

    def _demand(self, truth: bool, rule: str, layer: str, problem: str) -> None:  # noqa: FBT001 - as `assert`
        if not truth:
            raise ContractError(f"{rule}: {layer} {problem}")


def _fields(request: Request) -> tuple[Any, ...]:
    return request.op, request.offset, request.length, id(request.iov), request.tag
