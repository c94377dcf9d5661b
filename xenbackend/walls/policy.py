"""Policies: which system calls a process may make, parsed from readable files.

Must not know numbers of system calls, only whether a name has one, nor load anything into the kernel.

`policies/` has a file for workers and one for each need of a driver; the head of `worker.policy` explains the syntax.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xenbackend.errors import ConfigError
from xenbackend.walls.calls import NUMBERS, VALUES

WORKER = "worker"
DIRECTORY = Path(__file__).parent / "policies"


@dataclass(frozen=True, slots=True)
class Test:
    """A condition on an argument: it is one of the values (`is_in`), or it has none of their bits."""

    argument: int
    is_in: bool
    values: tuple[int, ...]


@dataclass(slots=True)
class Rule:
    """The rule for one call: allowed if one of the `tests` holds (None always does), else refused with `errno`."""

    tests: list[Test | None]
    errno: int = errno.EPERM


Policy = dict[str, Rule]  # by the call's name, in the order of the files


def load(kinds: Iterable[str]) -> Policy:
    """Return the union of the policies of these kinds. Raises: ConfigError, which names file and line."""
    policy: Policy = {}
    for kind in kinds:
        file = DIRECTORY / f"{kind}.policy"
        try:
            text = file.read_text(encoding="ascii")
        except FileNotFoundError:
            raise ConfigError(f"{file}: there is no such policy") from None
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
        parse(text, str(file), policy)
    return policy


def parse(text: str, where: str, policy: Policy) -> None:
    """Add the rules of a text to `policy`; `where` names the file, for messages. Raises: ConfigError."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            _parse_line(words, policy)
        except ValueError as problem:
            raise ConfigError(f"{where}:{number}: {problem}") from None


def _parse_line(words: list[str], policy: Policy) -> None:
    call, *condition = words
    if not any(call in numbers for numbers in NUMBERS.values()):
        raise ValueError(f"{call} is not a known system call; add its numbers to walls/calls.py")
    rule = policy.setdefault(call, Rule([]))
    match condition:
        case []:
            rule.tests.append(None)
        case ["no", code] if isinstance(found := getattr(errno, code, None), int):
            rule.errno = found
        case [place, ("in" | "lacks") as verb, _, *_] if place in {f"arg{number}" for number in range(6)}:
            values = tuple(_value(word) for word in condition[2:])
            rule.tests.append(Test(int(place[3:]), verb == "in", values))
        case _:
            raise ValueError(
                f"{' '.join(condition)!r} is not a condition; write argN in NAME, argN lacks NAME, or no ERRNO"
            )


def _value(word: str) -> int:
    if word not in VALUES:
        raise ValueError(f"{word} is not a known value; add its number to walls/calls.py")
    return VALUES[word]
