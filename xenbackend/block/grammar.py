r"""The text of a chain, with layers, items and escapes: parses and formats it, and says where something is wrong.

Must not know a driver, an option or a file.

    chain = [prefix] layer *("|" layer)      the guest's end first
    layer = driver ":" [item *("," item)]

A backslash makes the character after it an ordinary one, so that every file name can be written: ``aio:/img/a\|b``.
The driver decides what an item means: its target, literally, or ``key=value``, split at the first ``=``.

The prefix is what toolstacks put before the text that the operator wrote: ``tap2:``, ``tap:`` or ``tapdisk:``, and one
format word of libxl (``aio:``, ``vhd:`` ...). A format word is a prefix only if a word with a colon follows it, so
``aio:log:|aio:/img`` is the chain ``log:|aio:/img``, and ``aio:/img`` is the driver aio. A relative file called
``log:x`` therefore has to be written as ``aio:log\:x``, which `format_layer` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from xenbackend.errors import ChainError

MAX_CHAIN = 4096  # bytes; XENSTORE_PAYLOAD_MAX of io/xs_wire.h: a longer text does not fit into a node
MAX_LAYERS = 32  # our choice: `submit` goes down one call per layer, and the stack is finite

_WORD = r"[a-z][a-z0-9_-]*"
_TAP = r"(?:tap2|tapdisk|tap):"
FORMATS = ("aio", "vhd", "qcow", "qcow2", "qed")  # libxl_utils.c, libxl__device_disk_string_of_format
_PREFIX = re.compile(rf"(?:{_TAP})*(?:(?:{'|'.join(FORMATS)}):(?={_WORD}:)(?:{_TAP})*)?")
_NAME = re.compile(_WORD)
_WORD_WITH_COLON = re.compile(rf"^({_WORD}):")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_SPECIAL = re.compile(r"[\\|,]")
_SHOWN = 72  # characters shown of a chain that is too long


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a layer, without escapes. `start` and `end` are columns in the chain's text."""

    text: str
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)
    value_start: int = field(default=0, compare=False)  # after the first "=", or `start` if there is none

    @property
    def length(self) -> int:
        """The number of columns of the item in the chain's text."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as it is written. `start` and `end` are columns in the chain's text; equality ignores them."""

    name: str
    items: tuple[Item, ...] = ()
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)


def parse(text: str) -> tuple[Layer, ...]:
    """Return the layers of a chain, the guest's end first; there is at least one.

    Raises: ChainError, with a column of `text` as it was given.
    """
    _check_whole(text)
    match = _PREFIX.match(text)
    start = match.end() if match else 0
    if not text[start:].strip():
        raise ChainError("the chain is empty; write layers such as log:|aio:/img", text, start)
    spans = _split(text, start, len(text), "|")
    if len(spans) > MAX_LAYERS:
        raise ChainError(
            f"the chain has {len(spans)} layers; at most {MAX_LAYERS} are possible", text, spans[MAX_LAYERS][0]
        )
    return tuple(_parse_layer(text, *span) for span in spans)


def format_chain(layers: tuple[Layer, ...]) -> str:
    """Return the canonical text: without a prefix, and with escapes only where they are needed."""
    return "|".join(format_layer(layer.name, *(item.text for item in layer.items)) for layer in layers)


def format_layer(name: str, *items: str) -> str:
    """Return the text of one layer, such as ``vhd:/img/base.vhd``, with its items escaped."""
    written = [format_item(item) for item in items]
    if written and name in FORMATS:  # else the name would be taken for a prefix
        written[0] = _WORD_WITH_COLON.sub(r"\1\:", written[0])
    return f"{name}:{','.join(written)}"


def format_file(name: str, path: str, *options: str) -> str:
    """Return the text of a layer whose first item is a file; a relative name of the form ``name=value`` gets a path."""
    is_like_an_option = "=" in path.partition("/")[0]
    return format_layer(name, f"./{path}" if is_like_an_option else path, *options)


def format_item(item: str) -> str:
    """Return the text of an item after the first one, such as ``key=value``, escaped."""
    return _SPECIAL.sub(r"\\\g<0>", item)


def _check_whole(text: str) -> None:
    size = len(text.encode(errors="surrogateescape"))
    if size > MAX_CHAIN:
        shown = f"{text[:_SHOWN]}..."
        raise ChainError(f"the chain has {size} bytes; at most {MAX_CHAIN} fit into xenstore", shown, _SHOWN, 3)
    if "\0" in text:
        raise ChainError("a chain cannot hold a zero byte", text.replace("\0", "?"), text.index("\0"))
    backslashes = len(text) - len(text.rstrip("\\"))
    if backslashes % 2:
        raise ChainError(r"nothing follows the backslash; write \\ for the character itself", text, len(text) - 1)


def _split(text: str, start: int, end: int, mark: str) -> list[tuple[int, int]]:
    """Return the spans between marks that are not escaped."""
    spans = []
    begin = place = start
    while place < end:
        if text[place] == mark:
            spans.append((begin, place))
            begin = place + 1
        place += 2 if text[place] == "\\" else 1
    return [*spans, (begin, end)]


def _parse_layer(text: str, start: int, end: int) -> Layer:
    raw = text[start:end]
    if not raw.strip():
        raise ChainError("a layer is empty; remove one | or write a layer between them", text, start)
    match = _NAME.match(raw)
    if match is None or raw[match.end() : match.end() + 1] != ":":
        raise ChainError(_no_driver(raw), text, start, end - start)
    begin = start + match.end() + 1
    spans = _split(text, begin, end, ",") if begin < end else []
    return Layer(match[0], tuple(_parse_item(text, *span) for span in spans), start, end)


def _parse_item(text: str, start: int, end: int) -> Item:
    sign = text.find("=", start, end)
    return Item(_ESCAPED.sub(r"\1", text[start:end]), start, end, start if sign < 0 else sign + 1)


def _no_driver(raw: str) -> str:
    if raw.startswith((".", "/")):
        return f"{raw!r} is a file, not a layer; write the driver before it, as in aio:{raw}"
    if _NAME.fullmatch(raw):
        return rf"{raw!r} has no colon; write {raw}: for the driver, or \| before it if it belongs to a file name"
    return f"{raw!r} does not begin with a driver's name and a colon, as in aio:/img"
