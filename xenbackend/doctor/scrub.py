"""Takes secrets out of a text that is to leave the host.

Must not be all that keeps them in: whoever gathers takes no file with secrets in the first place (`doctor.pieces`).

Chains name the files of passphrases, and those names stay. What is masked are values that somebody has written where
they do not belong, or that drivers of third parties take: in options, addresses, log lines.
"""

from __future__ import annotations

import re

MASK = "(masked)"
_NAMES = r"[\w.-]*(?:pass(?:wd|word|phrase)?|secret|token|credentials?|api[_-]?key|private[_-]?key)[\w.-]*"
_PLACE = r"(?!/|credential:)"  # a path, or the name of a credential, is no secret
_RULES = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), MASK),
    (re.compile(r"(?i)([a-z][a-z0-9+.-]*://)[^/\s@\"']+@"), rf"\1{MASK}@"),  # RFC 3986, userinfo
    (re.compile(r"\bAQ[A-Za-z0-9+/]{36}=="), MASK),  # a key of Ceph: 28 bytes, of which the first ones tell its kind
    (re.compile(rf"(?i)(\b{_NAMES}[\"']?\s*[=:]\s*)([\"']){_PLACE}(?:\\.|(?!\2).)+\2"), rf"\1\2{MASK}\2"),
    (re.compile(rf"(?i)(\b{_NAMES}\s*=\s*){_PLACE}[^\s,|\"';&()]+"), rf"\1{MASK}"),
    (re.compile(rf"(?i)(\b{_NAMES}:\s+){_PLACE}[^\s,|\"';&()]+"), rf"\1{MASK}"),
    (re.compile(rf"((?<![\w])key\s*=\s*){_PLACE}[^\s,|\"';&()]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(\bauthorization:\s*)[^\r\n]+"), rf"\1{MASK}"),
)


def scrub(text: str) -> str:
    """Return a text without what looks like a secret."""
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    return text
