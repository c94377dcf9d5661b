"""Tests of `xenbackend.supervisor.service.bugs`: exceptions that nobody expects."""

from __future__ import annotations

import io

from xenbackend.supervisor.service.bugs import Bugs


def _fail(kind: type[Exception]) -> Exception:
    try:
        raise kind("a bug of ours")
    except Exception as bug:
        bug.add_note("while vbd/5/51712 was handled")
        return bug


def test_each_is_told_once(lines: io.StringIO) -> None:
    """The first exception of a kind from a place is logged with its traceback and with the vbd that it concerned; all
    are counted.
    """
    bugs = Bugs()
    for kind in (ValueError, KeyError, ValueError, ValueError):
        bugs.note(_fail(kind))
    bugs.note(RuntimeError("nobody raised it"))
    said = lines.getvalue()

    assert (5, 3) == (bugs.count, said.count("<3>service: an internal error (a bug); "))
    assert (2, 1, 1) == (said.count("Traceback"), said.count("<3>ValueError: a bug"), said.count("<3>KeyError: "))
    assert 2 == said.count("while vbd/5/51712 was handled")


def test_what_is_told_is_bounded(lines: io.StringIO) -> None:
    """The number of exceptions that are logged is bounded, however many different ones there are."""
    bugs = Bugs()
    for number in range(5000):
        bugs.note(RuntimeError(str(number)))

    assert (5000, 1000) == (bugs.count, lines.getvalue().count("(a bug); "))
