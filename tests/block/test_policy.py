"""What the text of a policy can say, and what it must not."""

from __future__ import annotations

import errno

import pytest

from xenbackend.block.policy import DEFAULT, Action, Policy
from xenbackend.block.request import AWAY, CACHE_LOST, IMAGE_DAMAGED, Op
from xenbackend.errors import ConfigError

PAUSE, REPORT = Action(None), Action(0)


def test_nothing_said_is_the_default() -> None:
    """An empty text means the default, and the text of a policy is read back as the same policy."""
    assert DEFAULT == str(Policy()) == str(Policy(DEFAULT))


@pytest.mark.parametrize(
    ("op", "code", "action"),
    [
        (Op.WRITE, errno.ENOSPC, PAUSE),
        (Op.WRITE, errno.EDQUOT, PAUSE),
        (Op.DISCARD, errno.ENOSPC, PAUSE),
        (Op.WRITE, errno.EIO, REPORT),
        (Op.WRITE, IMAGE_DAMAGED, PAUSE),
        (Op.DISCARD, IMAGE_DAMAGED, PAUSE),
        (Op.DISCARD, errno.EIO, REPORT),
        (Op.READ, errno.EIO, Action(3, 1.0)),
        (Op.READ, errno.ENOSPC, Action(3, 1.0)),
        (Op.FLUSH, errno.ENOSPC, PAUSE),
        (Op.FLUSH, errno.EIO, PAUSE),
        *((op, AWAY, PAUSE) for op in Op),
    ],
)
def test_kinds_of_errors(op: Op, code: int, action: Action) -> None:
    """ENOSPC has a kind of its own for requests that alter the disk. Other errors have the kind of their operation."""
    assert action == Policy().action(op, code)


def test_what_is_said_replaces_its_part_only() -> None:
    """A text changes only the kinds that it names. Blanks are allowed, and the last word for a kind counts."""
    policy = Policy(" write = retry 2 every 0.5s , read=report, read=pause ")

    assert "enospc=pause,read=pause,write=retry 2 every 0.5s,flush=pause,away=pause" == str(policy)
    assert Action(2, 0.5) == policy.action(Op.WRITE, errno.EIO)
    assert PAUSE == policy.action(Op.WRITE, IMAGE_DAMAGED)  # whatever it says


def test_what_only_a_cache_has_is_waited_for_whatever_was_said() -> None:
    """A request for a block of which only a cache's failing file has a copy is paused, whatever the policy says."""
    policy = Policy("read=report,write=report,away=report")

    assert [PAUSE] * 3 == [policy.action(op, CACHE_LOST) for op in (Op.READ, Op.WRITE, Op.DISCARD)]


def test_a_server_that_is_away_may_be_an_error_but_for_a_flush() -> None:
    """The kind `away` can be an error for all requests but a flush, which waits in any case."""
    policy = Policy("away=retry 5 every 2s")

    assert [Action(5, 2.0)] * 3 == [policy.action(op, AWAY) for op in (Op.READ, Op.WRITE, Op.DISCARD)]
    assert PAUSE == policy.action(Op.FLUSH, AWAY)
    assert REPORT == policy.action(Op.WRITE, errno.EIO)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("flush=report", "never flushes again"),
        ("flush=retry 3 every 1s", "never flushes again"),
        ("flush", "lets a flush nothing"),
        ("writes=pause", "names 'writes'; write KIND=ACTION, where KIND is one of enospc, read, write, flush"),
        ("read", "says '' for read"),
        ("read=retry", "can be pause, report, or retry 3 every 1s"),
        ("read=retry 3 every 1", "can be"),
        ("read=retry -1 every 1s", "can be"),
        ("read=retry 0 every 1s", "1 to 1000 times"),
        ("read=retry 1001 every 1s", "1 to 1000 times"),
        ("read=retry 3 every 0s", "up to 60s apart"),
        ("read=retry 3 every 61s", "up to 60s apart"),
    ],
)
def test_what_may_not_be_said(text: str, why: str) -> None:
    """A text that is not understood, or that would harm a guest, is refused by a message that quotes it."""
    with pytest.raises(ConfigError) as caught:
        Policy(text)

    assert repr(text) in str(caught.value)
    assert why in str(caught.value)
