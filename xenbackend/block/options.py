"""The options of a driver: one frozen dataclass per driver describes, parses, checks and documents them.

Must not know a driver by name.

    @dataclass(frozen=True, slots=True)
    class Options:
        file: FilePath = option("the image", target=True)
        cache: bool = option("use the page cache", default=False)

The annotation determines how a value is parsed: `str`, `int`, `float`, `bool` (on, off, yes, no), `Literal["a", "b"]`,
or one of the kinds below. For a kind of your own write ``Annotated[type, Kind(...)]``. Conditions on several options
are checked in `__post_init__`, which raises ValueError with a sentence.
"""

from __future__ import annotations

import errno as errno_module
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from xenbackend.block.grammar import Item, Layer
from xenbackend.errors import ChainError
from xenbackend.units import format_duration, format_size, parse_duration, parse_size


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one kind are parsed and shown. `parse` raises ValueError with a sentence for the operator.

    `use` says what a driver does with a text: it opens the file of that name (IMAGE, RECORD), it has a key derived from
    the passphrase there (KEY), or neither ("").
    """

    noun: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str
    use: str = ""


@dataclass(frozen=True, slots=True)
class OptionHelp:
    """One line of a driver's table of options, for people."""

    name: str
    kind: str
    default: str  # "" if the option must be given
    text: str
    is_target: bool


def option(text: str, *, default: Any = MISSING, target: bool = False) -> Any:
    """Return a dataclass field for an option; without `default` it must be given.

    Args:
        text: the line for the manual.
        default: the value if the chain does not name the option; must not be mutable.
        target: the option is the driver's first item, whatever that contains. If it has a default it may be left out,
            and a first item that looks like another option is that option: ``log:track=off`` names no file. If it is
            a file, nothing of the form ``name=value`` is one, since ``log:trakc=off`` would create a file of that
            name. A file whose name has such a form is named with a slash before the sign: ``./name=value``.
    """
    return field(default=default, metadata={"help": text, "target": target})


def parse_options(options: type, layer: Layer, chain: str) -> Any:
    """Return an instance of the dataclass `options` from the items of `layer`; `chain` is the text of the whole chain.

    Raises: ChainError.
    """
    values: dict[str, Any] = {}
    kinds = _kinds(options)
    items = list(layer.items)
    target = target_of(options)
    if target and items and not _is_left_out(options, target, items[0].text):
        first = items.pop(0)
        _check_target(options, target, layer, first, chain)
        if first.text:
            values[target] = _parse_value(kinds[target], layer.name, target, first.text, chain, first.start, first.end)
    for item in items:
        _parse_item(values, kinds, layer, item, chain, target)
    return _build(options, values, layer, chain)


def target_of(options: type) -> str:
    """Return the name of the option that is the first item, or an empty text."""
    return next((each.name for each in fields(options) if each.metadata.get("target")), "")


def files_of(options: Any) -> dict[str, str]:
    """Return the files that parsed options name, as option to path."""
    of: type = type(options)
    return {
        name: getattr(options, name)
        for name, kind in _kinds(of).items()
        if kind.noun == FILE.noun and getattr(options, name)
    }


def uses_of(options: Any) -> dict[str, str]:
    """Return what parsed options let a driver use: a path to IMAGE or RECORD, or a source of a passphrase to KEY."""
    of: type = type(options)
    kinds = _kinds(of)
    values = {name: getattr(options, name) for name, kind in kinds.items() if kind.use}
    return {value: kinds[name].use for name, value in values.items() if isinstance(value, str) and value}


def describe_options(options: type) -> list[OptionHelp]:
    """Return the table of a driver's options in the order of the dataclass."""
    kinds = _kinds(options)
    return [
        OptionHelp(
            name=each.name,
            kind=kinds[each.name].noun,
            default="" if each.default is MISSING else _show(kinds[each.name], each.default),
            text=str(each.metadata["help"]),
            is_target=bool(each.metadata["target"]),
        )
        for each in fields(options)
    ]


def nearest(word: str, words: Iterable[str]) -> str:
    """Return an addition to a sentence about an unknown word, with the nearest known one, or an empty text."""
    import difflib  # late: most words are right

    close = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_left_out(options: type, target: str, first: str) -> bool:
    """Return whether the first item is another option, and the target may be left out."""
    key, sign, _ = first.partition("=")
    may_be = {each.name: each.default is not MISSING for each in fields(options)}
    return bool(sign) and may_be[target] and key in may_be and key != target


def _check_target(options: type, target: str, layer: Layer, first: Item, chain: str) -> None:
    """Refuse what is an option, known or not, in the place of the target. Raises: ChainError."""
    key, sign, _ = first.text.partition("=")
    kinds = _kinds(options)
    is_file = kinds[target].noun == FILE.noun
    if not sign or "/" in key or kinds[target] is _PLAIN[str]:
        return
    length = first.value_start - 1 - first.start
    if key == target:
        raise ChainError(f"{layer.name}: write {key} first and without {key}=", chain, first.start, length)
    if is_file and key in kinds:
        raise ChainError(_missing(options, layer.name, target), chain, first.start, length)
    if is_file:
        problem = _unknown(layer.name, key, kinds, target, " (a file needs its whole path)")
        raise ChainError(problem, chain, first.start, length)


def _show(kind: Kind, value: Any) -> str:
    return "none" if value is None or value == "" else kind.show(value)


def _parse_item(
    values: dict[str, Any], kinds: Mapping[str, Kind], layer: Layer, item: Item, chain: str, target: str
) -> None:
    key, sign, value = item.text.partition("=")
    if not sign:
        problem = f"{layer.name}: {key!r} is not key=value" if key else f"{layer.name}: an option is empty"
        raise ChainError(problem, chain, item.start, item.length)
    key_length = item.value_start - 1 - item.start
    if key == target:
        raise ChainError(f"{layer.name}: write {key} first and without {key}=", chain, item.start, key_length)
    if key not in kinds:
        raise ChainError(_unknown(layer.name, key, kinds, target), chain, item.start, key_length)
    if key in values:
        raise ChainError(f"{layer.name}: option {key} is given twice", chain, item.start, item.length)
    values[key] = _parse_value(kinds[key], layer.name, key, value, chain, item.value_start, item.end)


def _parse_value(kind: Kind, driver: str, name: str, text: str, chain: str, start: int, end: int) -> Any:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise ChainError(f"{driver}: option {name}: {error}", chain, start, end - start) from None


def _unknown(driver: str, key: str, kinds: Mapping[str, Kind], target: str, aside: str = "") -> str:
    known = [name for name in kinds if name != target]
    has = f"it knows {', '.join(known)}" if known else "it has none"
    return f"{driver}: unknown option {key!r}{aside}; {has}{nearest(key, known)}"


def _missing(options: type, driver: str, name: str) -> str:
    text = next(each.metadata["help"] for each in fields(options) if each.name == name)
    return f"{driver}: the {name} is missing: {text}"


def _build(options: type, values: dict[str, Any], layer: Layer, chain: str) -> Any:
    length = layer.end - layer.start
    for each in fields(options):
        if each.name not in values and each.default is MISSING:
            raise ChainError(_missing(options, layer.name, each.name), chain, layer.start, length)
    try:
        return options(**values)
    except ValueError as error:
        raise ChainError(f"{layer.name}: {error}", chain, layer.start, length) from None


@cache  # annotations are texts, which would be evaluated each time
def _kinds(options: type) -> Mapping[str, Kind]:
    hints = get_type_hints(options, include_extras=True)
    return {each.name: _kind(hints[each.name]) for each in fields(options)}


def _kind(annotation: Any) -> Kind:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next(each for each in arguments if isinstance(each, Kind))
    if origin is Literal:
        return choice(arguments)
    if type(None) in arguments:
        return _kind(next(each for each in arguments if each is not type(None)))
    return _PLAIN[annotation]


def choice(words: tuple[str, ...]) -> Kind:
    """Return the kind of an option whose value is one of `words`."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return Kind(" or ".join(words), parse)


def _parse_bool(text: str) -> bool:
    if text not in _BOOLS:
        raise ValueError(f"{text!r} is not one of on, off, yes, no")
    return _BOOLS[text]


def _number(noun: str, convert: Callable[[str], Any], low: float, high: float) -> Kind:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {noun}") from None
        if not low <= value <= high:
            raise ValueError(f"{text!r} is not {noun}")
        return value

    return Kind(noun, parse)


def _parse_errno(text: str) -> int:
    number = getattr(errno_module, text.upper(), 0) if text[:1].isalpha() else int(text) if text.isdecimal() else 0
    if number not in errno_module.errorcode:
        raise ValueError(f"{text!r} is not an error of this system; write a name such as EIO or ENOSPC, or its number")
    return int(number)


def _parse_span(text: str) -> tuple[int, int]:
    first, sign, last = text.partition("-")
    if not sign:
        raise ValueError(f"{text!r} is not a range; write START-END in bytes, as in 1M-2M")
    start, end = parse_size(first), parse_size(last)
    if start >= end:
        raise ValueError(f"{text!r} is an empty range; the end must be after the start, and is excluded")
    return start, end


_INFINITY = float("inf")
_BOOLS = {"on": True, "yes": True, "true": True, "1": True, "off": False, "no": False, "false": False, "0": False}
_PLAIN: dict[Any, Kind] = {
    str: Kind("text", str),
    int: _number("a whole number", int, -_INFINITY, _INFINITY),
    float: _number("a number", float, -1e300, 1e300),
    bool: Kind("on or off", _parse_bool, lambda value: "on" if value else "off"),
}
IMAGE = "image"  # a file or block device that exists
RECORD = "record"  # a regular file that is created if it does not exist, and one beside it whose name ends in .1
KEY = "key"  # a passphrase, which no worker sees (`block.keys`)
FILE = Kind("file", os.fspath, use=IMAGE)

FilePath = Annotated[str, FILE]  # names a file; loops of parents are detected by these
RecordPath = Annotated[str, Kind(FILE.noun, os.fspath, use=RECORD)]
Size = Annotated[int, Kind("size", parse_size, format_size)]  # bytes
Duration = Annotated[float, Kind("duration", parse_duration, format_duration)]  # seconds
Errno = Annotated[int, Kind("errno", _parse_errno, lambda number: errno_module.errorcode[number])]  # positive
Count = Annotated[int, _number("a whole number of 0 or more", int, 0, _INFINITY)]
Fraction = Annotated[float, _number("a number from 0 to 1", float, 0, 1)]
Span = Annotated[  # bytes: the first one, and the one after the last
    tuple[int, int], Kind("range", _parse_span, lambda span: f"{format_size(span[0])}-{format_size(span[1])}")
]
