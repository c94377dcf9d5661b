"""The driver fault."""

from __future__ import annotations

import errno

import pytest

from tests.helpers_block import Machine, discard, flush, read, write
from xenbackend.block.request import Request
from xenbackend.errors import ChainError


def outcome(machine: Machine, options: str, *batch: Request) -> list[int]:
    """Return the status of each request that went through the filter."""
    chain = machine.open(f"fault:{options}|null:1G")
    try:
        return machine.do(chain, *batch)
    finally:
        chain.close()


def reads(count: int) -> list[Request]:
    """Return reads of 4 KiB at consecutive places."""
    return [read(number * 4096, 4096) for number in range(count)]


def test_without_conditions_everything_fails(machine: Machine) -> None:
    """The plain filter ends every request with EIO."""
    batch = [read(0, 512), write(0, bytes(512)), flush(), discard(0, 512)]

    assert [errno.EIO] * 4 == outcome(machine, "", *batch)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("errno=ENOSPC,op=read", [errno.ENOSPC] * 6),
        ("op=write", [0] * 6),
        ("every=2", [errno.EIO, 0] * 3),
        ("skip=3", [0, 0, 0, errno.EIO, errno.EIO, errno.EIO]),
        ("limit=2", [errno.EIO, errno.EIO, 0, 0, 0, 0]),
        ("skip=3,limit=1", [0, 0, 0, errno.EIO, 0, 0]),
        ("skip=1,every=3", [0, errno.EIO, 0, 0, errno.EIO, 0]),
        ("range=4096-4097", [0, errno.EIO, 0, 0, 0, 0]),
        ("range=4095-12K", [errno.EIO, errno.EIO, errno.EIO, 0, 0, 0]),
        ("range=1K-4096", [errno.EIO, 0, 0, 0, 0, 0]),
        ("rate=0", [0] * 6),
    ],
)
def test_conditions_choose_what_fails(machine: Machine, options: str, expected: list[int]) -> None:
    """Operation, range, every, skip and limit choose exactly which of six reads of 4 KiB fail, and with which error."""
    assert expected == outcome(machine, options, *reads(6))


def test_a_flush_matches_no_range(machine: Machine) -> None:
    """A flush covers no bytes, so it passes if a range is given. It can be chosen as an operation."""
    assert [0] == outcome(machine, "range=0-1G", flush())
    assert [0, errno.EIO] == outcome(machine, "op=flush", read(0, 512), flush())


def test_the_rate_is_met_and_repeatable(machine: Machine) -> None:
    """About `rate` of the requests fail, and the same ones for the same seed."""
    first, again, other = (outcome(machine, f"rate=0.25,seed={seed}", *reads(1000)) for seed in (1, 1, 2))

    assert first == again
    assert first != other
    assert 180 < sum(map(bool, first)) < 320


def test_failures_are_counted(machine: Machine) -> None:
    """The verb `count` answers with the number of requests that failed."""
    chain = machine.open("fault:every=2|null:1G")
    machine.do(chain, *reads(5))
    count = chain.control("fault", "count", [])
    chain.close()

    assert count == b"3"


def test_one_in_none_is_refused(machine: Machine) -> None:
    """`every=0` is refused before the chain is opened."""
    with pytest.raises(ChainError, match="option every"):
        machine.open("fault:every=0|null:")
