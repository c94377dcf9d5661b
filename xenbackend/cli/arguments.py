"""The parser of every command, options that several commands take, and functions for argparse's `type`.

Must not know a command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from xenbackend.disks import DiskName, parse_disk
from xenbackend.errors import ConfigError
from xenbackend.units import parse_duration, parse_size

_T = TypeVar("_T")
_COLUMNS = 80  # if the width is not known


class UsageError(SystemExit):
    """A command line that cannot be parsed; the operator has been told."""

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence


class Help(argparse.HelpFormatter):
    """Finds the terminal's width itself: argparse makes a formatter for every option, and imports shutil for that."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=columns() - 2)  # argparse leaves two free, too


class LinesHelp(Help, argparse.RawDescriptionHelpFormatter):
    """Leaves a description's lines as they are."""


def columns() -> int:
    """Return the columns that shutil.get_terminal_size would."""
    with suppress(KeyError, ValueError):
        if (columns := int(os.environ["COLUMNS"])) > 0:
            return columns
    with suppress(AttributeError, ValueError, OSError):  # no standard output, or no terminal
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or _COLUMNS  # type: ignore[union-attr]  # or None
    return _COLUMNS


class Parser(argparse.ArgumentParser):
    """Accepts no abbreviations, which would break when options are added; shows a command's own usage."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": Help, **arguments})
        self.rewrite: Callable[[list[str]], list[str]] = list  # turns another spelling of the words into this one

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; report words that are left over as a mistake for this command, not for the program."""
        found, left = super().parse_known_args(None if args is None else self.rewrite(list(args)), namespace)
        if left:
            self.error(f"unknown arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and end with status 2."""
        self.print_usage(_stderr())
        self._print_message(f"{self.prog}: {message}; see: {self.prog} --help\n", _stderr())
        raise UsageError(message)


def check_command(words: Sequence[str], commands: Sequence[str], parser: Parser) -> None:
    """Report a first word that is neither a command nor an option, with the command that was probably meant."""
    if words and not words[0].startswith("-") and words[0] not in commands:
        import difflib  # late: few words are misspelt

        near = difflib.get_close_matches(words[0], commands, 1)
        parser.error(f"unknown command {words[0]!r}{f'; did you mean {near[0]}?' if near else ''}")


def add_json(parser: argparse.ArgumentParser, text: str = "print JSON, errors too; docs/json.md has its keys") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=text)


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add --socket; the environment may name another default, as for a simulated host."""
    from xenbackend.protocol.client import DEFAULT_SOCKET, SOCKET_VARIABLE, default_socket  # late: most need no service

    parser.add_argument(
        "--socket",
        default=default_socket(),
        metavar="PATH",
        help=f"the service's socket (${SOCKET_VARIABLE}, or {DEFAULT_SOCKET})",
    )


def add_order_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every order to the service takes."""
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="SECONDS",
        help="wait no longer; the order continues, and the exit status is 75 (default: as long as it takes)",
    )
    add_json(parser)
    add_socket(parser)


def size(text: str) -> int:
    """Return the bytes of a text such as ``64M``. Raises: argparse.ArgumentTypeError, with a sentence."""
    return _parse(parse_size, text)


def duration(text: str) -> float:
    """Return the seconds of a text such as ``5ms`` or ``1.5``. Raises: argparse.ArgumentTypeError, with a sentence."""
    return _parse(parse_duration, text)


def disk(text: str) -> DiskName:
    """Return the disk that a text such as ``5/xvda`` names. Raises: argparse.ArgumentTypeError, with a sentence."""
    return _parse(parse_disk, text)


def _parse(parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except (ValueError, ConfigError) as error:  # argparse would say no more than that it is invalid
        raise argparse.ArgumentTypeError(str(error)) from None


def _stderr() -> Any:
    import sys  # as it is now: tests put another one in its place

    return sys.stderr
