"""Candidates for a command line that is being typed: commands, options, disks, chains, files.

Must not print, raise, or wait for a service for more than a moment: somebody has pressed a key.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xenbackend.block.drivers import driver_names
from xenbackend.cli import complete_chain
from xenbackend.cli.arguments import Parser, UsageError
from xenbackend.client import Client, ServiceError

ANSWER_S = 0.2
_CHAINS = ("CHAIN", "LAYER", "FROM", "TO", "CHAIN_OR_FILE")
_FILES = ("FILE", "PATH", "NEW", "FILE.png", "KEY")


def candidates(words: Sequence[str], modules: dict[str, str]) -> list[str]:
    """Return the candidates for the last of these words: those after the program's name, up to the cursor.

    `modules` has, by command, the module of `cli` that knows it.
    """
    *before, current = words or ("",)
    if before[:1] == ["help"]:
        before = before[1:]
    if not before:
        named = [*modules, "help"] if not words[:-1] else list(modules)
        found: Iterator[str] = iter([*named, "--help", "--version"])
    elif before[0] in modules:
        found = _of_command(before, current, modules[before[0]])
    else:
        found = iter(())
    return [each for each in dict.fromkeys(found) if each.startswith(current) and each.isprintable()]


@dataclass(frozen=True, slots=True)
class Typed:
    """A shell's line up to the cursor.

    words   its words; the last one is being typed
    quote   the quote within which the last one is; empty if it is not within one
    kept    characters of the last word that the shell, which splits words at more characters, takes for earlier words
    """

    words: list[str]
    quote: str
    kept: int


def read_line(line: str, breaks: str = "") -> Typed:
    """Return the words of a shell's line; `breaks` are further characters at which the shell splits words."""
    words, word, quote, kept = [], "", "", 0
    has_word = False
    chars = iter(line)
    for char in chars:
        if quote and char == quote:
            quote = ""
        elif char == "\\" and quote != "'":
            following = next(chars, "")
            word += following if not quote or following in '"\\$`' else char + following
        elif quote:
            word += char
        elif char in "'\"":
            quote, has_word, kept = char, True, len(word)
        elif char.isspace():
            if word or has_word:
                words.append(word)
            word, has_word, kept = "", False, 0
        else:
            word += char
            kept = len(word) if char in breaks else kept
    return Typed([*words, word], quote, kept)


def _of_command(before: Sequence[str], current: str, module: str) -> Iterator[str]:
    """Yield the candidates after a command."""
    root = Parser(prog="xenbackend")
    commands = root.add_subparsers()
    importlib.import_module(f"xenbackend.cli.{module}").register(commands)
    parser: argparse.ArgumentParser = commands.choices[before[0]]
    control = _socket_of(before, parser)
    parser, pending, count = _follow(parser, before[1:])
    name, sign, value = current.partition("=")
    if pending is not None and pending.nargs != "?":
        yield from _of_action(pending, current, control)
    elif current.startswith("--") and sign:
        if (option := _wants_value(parser, name)) is not None:
            yield from (f"{name}={each}" for each in _of_action(option, value, control))
    elif current.startswith("-"):
        shown = [each for each in _actions(parser) if each.help is not argparse.SUPPRESS]
        yield from (text for each in shown for text in each.option_strings)
    elif (positional := _positional(parser, count)) is not None:
        yield from _of_action(positional, current, control)


def _follow(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.ArgumentParser, argparse.Action | None, int]:
    """Return where words lead: the parser that applies, an option that wants a value, the count of positional words."""
    pending: argparse.Action | None = None
    count = 0
    for word in words:
        if pending is not None:
            pending = None
        elif word.startswith("-") and word != "-":
            pending = None if "=" in word else _wants_value(parser, word)
        elif (inner := _inner(parser)) is not None and word in inner:
            parser, count = inner[word], 0
        else:
            count += 1
    return parser, pending, count


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions  # noqa: SLF001 - argparse tells them in no other way


def _inner(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    choices: Any = next((each.choices for each in _actions(parser) if each.nargs == argparse.PARSER), None)
    return choices if isinstance(choices, dict) else None


def _wants_value(parser: argparse.ArgumentParser, word: str) -> argparse.Action | None:
    """Return the option that a word names, if it takes a value."""
    action = next((each for each in _actions(parser) if word in each.option_strings), None)
    return action if action is not None and action.nargs != 0 else None


def _positional(parser: argparse.ArgumentParser, place: int) -> argparse.Action | None:
    """Return the positional argument at a place; one that takes several words has all further places."""
    found = [each for each in _actions(parser) if not each.option_strings]
    many = next((number for number, each in enumerate(found) if each.nargs in ("*", "+")), len(found))
    place = min(place, many)
    return found[place] if place < len(found) else None


def _of_action(action: argparse.Action, begin: str, control: str) -> Iterator[str]:
    """Yield the candidates for an argument."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if action.choices is not None:
        yield from map(str, action.choices)
    elif metavar == "DISK":
        yield from _disks(control)
    elif metavar in _CHAINS:
        yield from complete_chain.candidates(begin)
        if metavar == "CHAIN_OR_FILE":
            yield from complete_chain.files(begin)
    elif metavar == "DIR":
        yield from complete_chain.files(begin, only_directories=True)
    elif metavar in _FILES or action.type is Path:
        yield from complete_chain.files(begin)
    elif action.dest == "name":
        yield from driver_names()


def _socket_of(before: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Return the socket of the service to ask: the one on the line, or the command's default."""
    for word, following in zip(before, [*before[1:], ""], strict=True):
        if word == "--socket":
            return following
        if word.startswith("--socket="):
            return word.partition("=")[2]
    default = next((each.default for each in _walk(parser) if each.dest == "socket"), "")
    return str(default or "")


def _walk(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from _actions(parser)
    for inner in (_inner(parser) or {}).values():
        yield from _walk(inner)


def _disks(control: str) -> Iterator[str]:
    """Yield the names of the disks in service, by domain number and guest name, if the service answers at once."""
    with suppress(ServiceError, UsageError, OSError):
        disks = Client(control, answer_s=ANSWER_S).disks()
        yield from (each.vbd for each in disks)
        yield from (f"{each.guest}/{each.device}" for each in disks if each.guest)
