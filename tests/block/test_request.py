"""Requests."""

from __future__ import annotations

import pytest

from xenbackend.block.request import PENDING, Op, Request, clear


def test_a_request_begins_as_lent() -> None:
    """A fresh request is pending, and pending is no status that a layer may give."""
    assert Request().status == PENDING
    assert PENDING < 0


def test_a_request_holds_nothing_else() -> None:
    """Requests are pooled by the thousand: they have no room for attributes of a layer's own."""
    with pytest.raises(AttributeError):
        Request().note = "mine"


def test_a_request_shows_what_it_is() -> None:
    """The text of a request names what a reader of a log needs."""
    request = Request()
    request.op, request.offset, request.length = Op.WRITE, 4096, 512

    assert repr(request) == "<WRITE 4096+512 status=-1>"


def test_clearing_takes_any_length() -> None:
    """Memory longer than the zeros that are at hand is cleared to its end."""
    view = memoryview(bytearray(b"x" * 200_001))
    clear([view])

    assert bytes(200_001) == view
