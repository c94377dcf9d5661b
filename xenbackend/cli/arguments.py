"""Kinds of arguments that several commands take, for argparse's `type`.

Must not know a command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from xenbackend.units import parse_duration, parse_size

_T = TypeVar("_T")


def size(text: str) -> int:
    """Return the bytes of a text such as ``64M``. Raises: argparse.ArgumentTypeError, with a sentence."""
    return _parse(parse_size, text)


def duration(text: str) -> float:
    """Return the seconds of a text such as ``5ms`` or ``1.5``. Raises: argparse.ArgumentTypeError, with a sentence."""
    return _parse(parse_duration, text)


def _parse(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:  # argparse would say no more than that it is invalid
        raise argparse.ArgumentTypeError(str(error)) from None
