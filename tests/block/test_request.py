"""Requests."""

from __future__ import annotations

import pytest

from xenbackend.block.request import PENDING, Op, Request, clear


def test_a_request_begins_as_lent() -> None:
    """A new request is pending. Pending is not a status that a layer may give."""
    assert Request().status == PENDING
    assert PENDING < 0


def test_a_request_holds_nothing_else() -> None:
    """Requests are pooled by the thousand, so layers cannot add attributes to them."""
    with pytest.raises(AttributeError):
        Request().note = "mine"


def test_a_request_shows_what_it_is() -> None:
    """The text of a request has everything that a reader of a log needs."""
    request = Request()
    request.op, request.offset, request.length = Op.WRITE, 4096, 512

    assert repr(request) == "<WRITE 4096+512 status=-1>"


def test_clearing_takes_any_length() -> None:
    """Memory of any length is cleared, even if it is longer than the prepared block of zeros."""
    view = memoryview(bytearray(b"x" * 200_001))
    clear([view])

    assert bytes(200_001) == view
