"""How several disks share one limit."""

from __future__ import annotations

import math
from random import Random

import pytest

from xenbackend.block.shares import FIRST, divide, step, wanted


@pytest.mark.parametrize(
    ("wishes", "shares"),
    [
        ([1.0], [1.0]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([1.0, 0.1], [0.9, 0.1]),
        ([1.0, 1.0, 0.2], [0.4, 0.4, 0.2]),
        ([0.1, 0.1], [0.5, 0.5]),
        ([1e9, 1.0], [0.5, 0.5]),
        ([-5.0, 1.0], [0.0, 1.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.25] * 4),
        ([1.0, math.nan, 0.4], [0.6, 0.0, 0.4]),
        ([math.nan, 0.4, 1.0], [0.0, 0.4, 0.6]),
        ([math.inf, 1.0], [0.0, 1.0]),
    ],
)
def test_who_wants_more_than_his_part_gets_what_the_others_leave(wishes: list[float], shares: list[float]) -> None:
    """A disk that wants more than its fair part gets what the others leave, in equal parts, however much it claims."""
    found = divide(dict(enumerate(wishes)))

    assert pytest.approx(shares) == [found[number] for number in range(len(wishes))]


def test_nobody_loses_by_what_another_one_says() -> None:
    """Whatever the wishes, a disk gets its fair part if it wants it, and the shares add up to the whole limit."""
    chance = Random(1)
    for _ in range(2000):
        wishes = {number: chance.choice([0.0, 1.0, chance.random(), 1e18]) for number in range(chance.randint(1, 12))}
        shares = divide(wishes)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(share >= min(wishes[each], 1 / len(wishes)) - 1e-9 for each, share in shares.items())


def test_at_no_moment_there_is_more_than_the_limit() -> None:
    """Shares in use never exceed the limit: what is taken from one disk is given to another only in the next step."""
    chance = Random(2)
    now = dict.fromkeys(range(8), FIRST)
    for _ in range(500):
        aims = divide({number: chance.choice([0.0, 1.0, chance.random()]) for number in now})
        former, now = now, step(now, aims)
        assert sum(max(former[each], now[each]) for each in now) <= 1.0 + 1e-9
    for _ in range(3):
        now = step(now, aims)

    assert now == pytest.approx(aims)


def test_too_much_that_was_handed_out_is_taken_back() -> None:
    """If first shares exceed the limit because there are many disks, they are reduced."""
    now = dict.fromkeys(range(40), FIRST)
    aims = divide(dict.fromkeys(range(40), 1.0))

    assert pytest.approx(aims) == step(now, aims)


def test_who_is_not_held_back_gets_a_little_more_than_he_uses() -> None:
    """A disk that is not held back gets a little more than it uses, and an idle one a small share to begin with. An
    absurd claim counts as the whole limit.
    """
    assert 1.0 == wanted(0.0, is_held=True, members=4)
    assert 0.5 == wanted(0.4, is_held=False, members=4)
    assert 0.0 < wanted(0.0, is_held=False, members=4) < 0.05
    assert 1.0 == wanted(1e30, is_held=False, members=4)
    nothing = wanted(0.0, is_held=False, members=4)
    assert [nothing] * 3 == [wanted(used, is_held=False, members=4) for used in (math.nan, math.inf, -math.inf)]
