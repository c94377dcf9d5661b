"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from xenbackend.cli.arguments import duration, size


def test_quantities_are_read_as_everywhere_else() -> None:
    """A size has the suffixes of a chain's sizes, a duration those of a chain's durations."""
    assert (64 << 20, 0.005, 1.5) == (size("64M"), duration("5ms"), duration("1.5"))


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [(size, "64X", "'64X' is not a size; write bytes"), (duration, "nan", "'nan' is not a duration; write a number")],
)
def test_what_is_wrong_is_said(parse: Callable[[str], object], text: str, sentence: str) -> None:
    """The sentence about a quantity reaches the operator: argparse prints it behind the argument's name."""
    with pytest.raises(argparse.ArgumentTypeError, match=sentence):
        parse(text)
