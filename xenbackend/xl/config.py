r"""xl's configuration language, as far as it is needed to find the disks in a text, read as xl reads it.

Must not change a text, know the meaning of a disk line, or read a file.

    file  = statements of NAME = value or NAME += value, each ended by a newline or ";"
    value = 'string' | "string" | number | [ value, value, ]    a list may contain newlines and comments

The last setting of a name counts; ``+=`` appends to the previous one. Source: libxl's libxlu_cfg_l.l, libxlu_cfg_y.y
and libxlu_cfg.c. This parser refuses what xl refuses, and lists that are nested deeper than `_DEPTH`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NoReturn

from xenbackend.errors import ConfigError

_TOKEN = re.compile(
    r"""(?P<blank>[ \t]+)
    | (?P<name>[a-z][._0-9a-z]*)
    | (?P<number>[0-9][0-9a-fx]*)
    | (?P<string>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")
    | (?P<mark>\+=|[=,;\[\]])
    | (?P<end>\n|\#.*\n)""",
    re.VERBOSE,
)
_WORD = re.compile(r"[^ \t\n]{1,40}")
_ESCAPE = re.compile(r"\\(.)")
_SIMPLE = dict(zip("\"'\\abfnrtv", "\"'\\\a\b\f\n\r\t\v", strict=True))
_NUMERIC = re.compile(r"[ \t\v\f\r]*[+-]?[0-9]+")  # what strtoul accepts of the three characters that xl passes
_ENDS = {"end": "the end of the line", "over": "the end of the file"}
_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Atom:
    """A string or number: its value, and its span in the text, including quotes."""

    value: str
    start: int
    end: int


_Value = Atom | list["_Value"]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int


def read_disks(text: str, source: str) -> tuple[Atom, ...]:
    """Return the disk lines that xl would find in a text, in order.

    Raises: ConfigError, with `source` and the line, if xl refuses the text.
    """
    disks = _Reader(text, source).settings().get("disk")
    if not isinstance(disks, list):
        return ()
    end = next((place for place, each in enumerate(disks) if not isinstance(each, Atom)), len(disks))  # xl stops there
    return tuple(each for each in disks[:end] if isinstance(each, Atom))


def line_of(text: str, position: int) -> int:
    """Return the number of the line that contains a position, counted from 1."""
    return text.count("\n", 0, position) + 1


def quote(value: str, mark: str = "'") -> str:
    r"""Return a string quoted for xl; `mark` is ``'`` or ``"``."""
    escaped = value.replace("\\", "\\\\").replace(mark, f"\\{mark}").replace("\n", "\\n")
    return f"{mark}{escaped}{mark}"


class _Reader:
    """One pass over a text."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._tokens = self._split()
        self._place = 0

    def settings(self) -> dict[str, _Value]:
        """Return the final value of each name. Raises: ConfigError."""
        settings: dict[str, _Value] = {}
        while (token := self._next()).kind != "over":
            if token.kind == "end" or token.text == ";":
                continue
            if token.kind != "name":
                self._refuse(token, "is not the name of a setting")
            self._assign(settings, token)
        return settings

    def _split(self) -> list[_Token]:
        tokens = []
        place = 0
        while place < len(self._text):
            match = _TOKEN.match(self._text, place)
            if match is None and len(os.fsencode(self._text[place:])) == 1:
                break  # xl's scanner ignores a single last byte, whatever it is
            if match is None or "\0" in match[0]:
                word = _WORD.match(self._text, place)
                self._refuse(_Token("", word[0] if word else "", place), "is not valid in an xl configuration")
            if match.lastgroup != "blank":
                tokens.append(_Token(match.lastgroup or "", match[0], place))
            place = match.end()
        return [*tokens, _Token("over", "", len(self._text))]

    def _next(self) -> _Token:
        token = self._tokens[self._place]
        self._place += 1
        return token

    def _assign(self, settings: dict[str, _Value], name: _Token) -> None:
        sign = self._next()
        if sign.text not in {"=", "+="}:
            self._refuse(sign, f"is where {name.text} needs = or +=")
        value = self._value(self._next())
        before = settings.get(name.text) if sign.text == "+=" else None
        if before is not None:
            if isinstance(before, Atom) or isinstance(value, Atom):
                if type(before) is not type(value):
                    self._refuse(sign, f"cannot add a list to a single value of {name.text}, or the other way round")
            else:
                value = [*before, *value]
        settings[name.text] = value
        end = self._next()
        if end.kind == "over":
            self._place -= 1
        elif end.kind != "end" and end.text != ";":
            self._refuse(end, f"comes after the value of {name.text}; end the line before it")

    def _value(self, token: _Token, depth: int = 0) -> _Value:
        if token.kind == "string":
            return Atom(self._unquote(token), token.start, token.start + len(token.text))
        if token.kind == "number":
            return Atom(token.text, token.start, token.start + len(token.text))
        if token.text != "[" or token.kind != "mark" or depth == _DEPTH:
            self._refuse(token, "is where a value should be: a 'string', a number or a [list]")
        values: list[_Value] = []
        token = self._next_in_list()
        while token.text != "]" or token.kind != "mark":
            values.append(self._value(token, depth + 1))
            token = self._next_in_list()
            if token.text == ",":
                token = self._next_in_list()
            elif token.text != "]":
                self._refuse(token, "comes after a value of a list; write a comma between them, or ] after the last")
        return values

    def _next_in_list(self) -> _Token:
        while (token := self._next()).kind == "end":
            pass
        return token

    def _unquote(self, token: _Token) -> str:
        """Return a string's value, as xlu__cfgl_dequote does: characters given as octal escapes are dropped."""
        inner = token.text[1:-1]
        value = []
        place = 0
        while match := _ESCAPE.search(inner, place):
            value.append(inner[place : match.start()])
            place = match.end()
            if match[1] in "01234567":
                number = _NUMERIC.match(inner[place : place + 3])
                if number is None or len(number[0]) < 2:
                    self._refuse(token, "has an octal escape that xl refuses")
                place += len(number[0])
            elif match[1] in _SIMPLE:
                value.append(_SIMPLE[match[1]])
            else:
                self._refuse(token, rf"has the escape \{match[1]}, which xl refuses; write \\ for a backslash")
        return "".join((*value, inner[place:]))

    def _refuse(self, token: _Token, problem: str) -> NoReturn:
        line = line_of(self._text, token.start)
        word = _ENDS.get(token.kind) or repr(token.text)
        raise ConfigError(f"{self._source}:{line}: {word} {problem}")
