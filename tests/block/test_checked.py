"""The asserting layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers_block import Bottom, discard, flush, read, write
from xenbackend.block.checked import Checked, ContractError
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Request

SIZE = 8192


def linked(geometry: Geometry | None = None) -> tuple[Checked, Bottom, list[list[Request]]]:
    """Return an asserting layer, the layer below it, and the list of what comes back up."""
    checked, bottom, done = Checked("upper:", "lower:", geometry or Geometry(SIZE)), Bottom(), []
    checked.next, checked.complete = bottom, done.append
    bottom.complete = checked.on_complete
    return checked, bottom, done


def test_what_keeps_the_rules_passes() -> None:
    """Requests that keep the rules go down and come up unchanged."""
    checked, bottom, done = linked()
    batch = [read(0, 512, 4096), write(SIZE - 512, b"x" * 512), flush(), discard(0, SIZE)]
    checked.submit(list(batch))
    for request in batch:
        request.status = 0
    bottom.complete(list(batch))
    checked.close()

    assert [batch] == bottom.batches
    assert [batch] == done


def changed(request: Request, **fields: object) -> Request:
    """Return the request with some fields set."""
    for name, value in fields.items():
        setattr(request, name, value)
    return request


@pytest.mark.parametrize(
    ("batch", "rule"),
    [
        ([], "D2: upper: submitted an empty batch"),
        ([changed(flush(), status=0)], "D1: upper: submitted a request that is not pending"),
        ([read(SIZE - 512, 1024)], "Request: upper: went past 8192"),
        ([changed(read(0, 512), offset=-512)], "Request: upper: went past"),
        ([read(0, 100)], "Request: upper: submitted a request that is not of whole sectors"),
        ([read(256, 512)], "Request: upper: submitted a request that is not of whole sectors"),
        ([changed(read(0, 512), length=1024)], "Request: upper: 512 bytes"),
        ([changed(read(0, 512), op=3)], "Request: upper: 512 bytes"),
        ([discard(0, 0)], "Request: upper: submitted a request of no bytes"),
    ],
)
def test_what_the_upper_layer_does_wrong_is_its_fault(batch: list[Request], rule: str) -> None:
    """A request that must not be submitted is stopped before the layer below, and the upper layer is blamed."""
    checked, bottom, _ = linked()
    with pytest.raises(ContractError, match=rule):
        checked.submit(batch)

    assert bottom.batches == []


def test_a_read_only_layer_gets_no_writes() -> None:
    """A layer that said that it is read-only gets no request that alters data."""
    checked, _, _ = linked(Geometry(SIZE, read_only=True))
    checked.submit([read(0, 512), flush()])
    for request in (write(0, bytes(512)), discard(0, 512)):
        with pytest.raises(ContractError, match="Geometry: upper: read-only"):
            checked.submit([request])


def test_a_request_is_lent_once_at_a_time() -> None:
    """D1: a request that is in flight cannot be submitted again."""
    checked, _, _ = linked()
    request = flush()
    checked.submit([request])
    with pytest.raises(ContractError, match="D1: upper: submitted twice"):
        checked.submit([request])


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda request: [], "D2: lower: completed an empty batch"),
        (lambda request: [request], "D6: lower: gave back without a status"),
        (lambda request: [changed(flush(), status=0)], "D1: lower: gave back a request that it did not hold"),
        (lambda request: [changed(request, status=0)] * 2, "D1: lower: gave back a request that it did not hold"),
        (lambda request: [changed(request, status=0, offset=512)], "D1: lower: altered"),
        (lambda request: [changed(request, status=0, tag=7)], "D1: lower: altered"),
    ],
)
def test_what_the_lower_layer_does_wrong_is_its_fault(spoil: Callable[[Request], list[Request]], rule: str) -> None:
    """A completion that breaks the rules is found before it reaches the layer above, and the lower layer is blamed."""
    checked, bottom, done = linked()
    request = read(0, 512)
    checked.submit([request])
    with pytest.raises(ContractError, match=rule):
        bottom.complete(spoil(request))

    assert done == []


def test_nothing_is_in_flight_at_the_end() -> None:
    """D1: a layer that has kept a request is found when the chain is closed."""
    checked, _, _ = linked()
    checked.submit([flush()])
    with pytest.raises(ContractError, match="D1: lower: was closed while it held"):
        checked.close()
