"""Masks secrets in a text that will leave the host, in time linear in its length, whoever wrote the text.

Must not be the only protection: no file with secrets may be gathered in the first place (`doctor.pieces`).

Chains name files with passphrases, and these names are kept. Masked are secrets that somebody has written where they do
not belong, or that drivers of third parties take: in options, addresses, log lines.

Guests write some of these texts. So no pattern may backtrack, or match the same text from many places: each begins at a
place where it cannot begin again (a mark, the end of a name), uses possessive quantifiers (`*+`), and reads whatever
follows only once.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

MASK = "(masked)"
_NAME = re.compile(  # from the first secret word in a name to the name's end; `key` only counts as a whole name
    r"(?:(?i:pass|pwd|secret|token|credential|api[_-]?key|private[_-]?key)|(?<!\w)(?P<key>key)(?![\w.-]))[\w.-]*+"
)
_SIGN = re.compile(r"(\\*+[\"'])?\s*+([=:])(\s*+)")  # after a name, also in JSON that is a string within JSON
_GAP = re.compile(r"(?:\\*+[\"'],)?[ \t]++(?!-)")  # after an option of a command, also in a list of strings
_OPTION_MAX = 40  # characters of an option's name before the secret word
_OF_NAMES = f"{string.ascii_letters}{string.digits}_.-"
_QUOTE = re.compile(r"b?(\\*+)([\"'])")
_CLOSING = re.compile(r"(?<!\\)(\\*+)([\"'\r\n]|\Z)")
_PLAIN = re.compile(r"(?:;*+[^\s,|\"';&()]++)++")  # without a `;` at the end
_PLACE = ("/", "credential:")  # a path or the name of a credential is not a secret
_PEM_END = r"-----END [A-Z ]*PRIVATE KEY-----"
_PEM = re.compile(  # up to the end mark; if that is missing or far away, up to a character that no key has
    rf"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:(?:(?!-----)[\s\S]){{0,16384}}+{_PEM_END}|[A-Za-z0-9+/=:,\s\\]*+)"
)
_PEM_TAIL = re.compile(_PEM_END)
_PEM_BODY = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\\r\n"
_RULES = (
    (_PEM, MASK),
    (re.compile(r"(?<=[A-Za-z0-9+.-])://[^/\s\"']+@"), f"://{MASK}@"),  # RFC 3986, userinfo
    (re.compile(r"\bAQ[A-Za-z0-9+/]{36}=="), MASK),  # a Ceph key: 28 bytes, the first of which give its type
    (re.compile(r"(?i)(\bauthorization:\s*+)[^\r\n]++"), rf"\1{MASK}"),
)


def scrub(text: str) -> str:
    """Return a text with everything masked that looks like a secret."""
    text = _without_rest_of_key(text)
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return _without_values(text)


def _without_rest_of_key(text: str) -> str:
    """Mask a key of which the text has only the end, as the text may be the end of a log."""
    end = _PEM_TAIL.search(text)
    if end is None or _PEM.search(text, 0, end.start()):
        return text
    return text[: end.start()].rstrip(_PEM_BODY) + MASK + text[end.end() :]


def _without_values(text: str) -> str:
    """Mask values that follow the name of a secret."""
    pieces = []
    done = 0
    for begin, end in _values(text):
        pieces += [text[done:begin], MASK]
        done = end
    return "".join([*pieces, text[done:]])


def _values(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each value that follows the name of a secret, without its quotes."""
    at = 0
    while name := _NAME.search(text, at):
        at = name.end()
        sign = _SIGN.match(text, at)
        if sign is not None and name["key"] and sign[2] == ":" and not sign[1]:  # "key: " also begins sentences
            continue
        gap = sign or (_GAP.match(text, at) if _is_option(text, name.start()) else None)
        if gap is None:
            continue
        quote = _QUOTE.match(text, gap.end())
        begin = quote.end() if quote else gap.end()
        if text.startswith(_PLACE, begin):  # before its end is searched for: many such values may be nested
            continue
        if quote:
            at = _end_of_quoted(text, quote)
        elif (sign is None or _may_be_plain(sign)) and (plain := _PLAIN.match(text, begin)):
            at = plain.end()
        if begin < at:
            yield begin, at


def _is_option(text: str, at: int) -> bool:
    """Return whether the secret word at `at` is in the name of a command's option, such as ``--proxy-password``."""
    before = text[max(0, at - _OPTION_MAX) : at]
    return before[len(before.rstrip(_OF_NAMES)) :].startswith("-")


def _may_be_plain(sign: re.Match[str]) -> bool:
    """Return whether a text without quotes after this sign is a value, too."""
    return not sign[1] and (sign[2] == "=" or bool(sign[3]))


def _end_of_quoted(text: str, quote: re.Match[str]) -> int:
    """Return where a quoted value ends: at its closing quote, or at the end of the line if that is missing.

    Each level of strings within strings doubles the backslashes, and puts one before each quote. So their number shows
    which quote is on the value's own level.
    """
    own = len(quote[1])
    for end in _CLOSING.finditer(text, quote.end()):
        count = len(end[1])
        if end[2] not in ("'", '"'):
            return end.start(2)
        if end[2] == quote[2] and count >= own and (count - own) % (2 * (own + 1)) == 0:
            return end.start(2) - own
    return len(text)
