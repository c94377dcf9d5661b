"""Tests of `xenbackend.block.remote.lost`."""

from __future__ import annotations

import errno

import pytest

from xenbackend.block.remote.lost import errno_of, lost
from xenbackend.block.request import AWAY


@pytest.mark.parametrize(
    ("code", "is_broken", "why"),
    [
        (errno.ECONNRESET, False, "the server has reset the connection"),
        (errno.EPIPE, False, "the server has reset the connection"),
        (errno.ETIMEDOUT, True, "the connection broke: Connection timed out"),
    ],
)
def test_a_reset_is_the_servers_and_all_else_the_networks(code: int, *, is_broken: bool, why: str) -> None:
    """After a reset by the server nothing is under way there. An error of the network proves nothing."""
    found = lost(OSError(code, "Connection timed out"))
    assert (is_broken, why) == (found.is_broken, str(found))


@pytest.mark.parametrize(
    ("code", "expected"), [(108, AWAY), (95, errno.EOPNOTSUPP), (28, errno.ENOSPC), (7777, errno.EIO), (0, errno.EIO)]
)
def test_error_numbers_are_the_protocols(code: int, expected: int) -> None:
    """ESHUTDOWN means that the server goes away, and an unknown error number is EIO."""
    assert expected == errno_of(code)
