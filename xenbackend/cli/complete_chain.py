"""Candidates for a chain that is being typed: drivers, their options, files.

Must not open anything, nor say why a chain is wrong: `check` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator

from xenbackend.block.drivers import driver_names, find_driver
from xenbackend.block.keys import CREDENTIAL
from xenbackend.block.options import OptionHelp, describe_options

_BAR = re.compile(r"(?<!\\)\|")
_COMMA = re.compile(r"(?<!\\),")
_CHOICES = re.compile(r"[\w.-]+(?:(?:,| or) [\w.-]+)+")


def candidates(text: str, take: Callable[[str], bool] = lambda _: True) -> Iterator[str]:
    """Yield texts that continue the beginning of a chain; `take` chooses the drivers."""
    before, layer = _cut(_BAR, text)
    name, colon, rest = layer.partition(":")
    if not colon:
        yield from (f"{before}{each}:" for each in driver_names() if each.startswith(name) and take(each))
        return
    try:
        driver = find_driver(name)
        options = describe_options(driver.Options)
    except LookupError:
        return
    done, item = _cut(_COMMA, rest)
    given = {each.partition("=")[0] for each in _COMMA.split(done)}
    head = f"{before}{name}:{done}"
    yield from (head + each for each in _items(options, item, given, is_first=not done))
    if driver.is_filter and not item and not done and all(each.default for each in options):
        yield f"{head}|"


def files(text: str, *, only_directories: bool = False) -> Iterator[str]:
    """Yield paths that continue a text, directories with a slash; hidden ones only after their dot was typed."""
    directory, slash, begin = text.rpartition("/")
    try:
        with os.scandir(f"{directory}{slash}" or ".") as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.name.startswith(begin) and (begin or not entry.name.startswith(".")):
                    is_directory = entry.is_dir()
                    if is_directory or not only_directories:
                        yield f"{directory}{slash}{entry.name}{'/' if is_directory else ''}"
    except OSError:
        return


def _items(options: Iterable[OptionHelp], item: str, given: set[str], *, is_first: bool) -> Iterator[str]:
    """Yield the candidates for an item of a layer's options."""
    named = {each.name: each for each in options if not each.is_target}
    target = next((each for each in options if each.is_target), None)
    name, sign, value = item.partition("=")
    if sign and name in named:
        yield from (f"{name}={each}" for each in _values(named[name], value))
        return
    if is_first and target is not None:
        yield from _values(target, item)
    if not (is_first and target is not None and not target.default):
        yield from (f"{each}=" for each in named if each.startswith(item) and each not in given)


def _values(option: OptionHelp, begin: str) -> Iterator[str]:
    if option.kind.startswith("file"):
        yield from files(begin)
        if CREDENTIAL in option.kind and CREDENTIAL.startswith(begin):
            yield CREDENTIAL
    elif option.kind.startswith("unix:") or option.kind == "server":
        if begin.startswith("unix:"):
            yield from (f"unix:{each}" for each in files(begin.removeprefix("unix:")))
        elif "unix:".startswith(begin):
            yield "unix:"
    else:
        words = re.split(r", | or ", option.kind) if _CHOICES.fullmatch(option.kind) else []
        yield from (each for each in words if each.startswith(begin))


def _cut(mark: re.Pattern[str], text: str) -> tuple[str, str]:
    """Return the text up to the last mark, with it, and the rest."""
    places = [found.end() for found in mark.finditer(text)]
    return (text[: places[-1]], text[places[-1] :]) if places else ("", text)
