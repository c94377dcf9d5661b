"""Reads the settings of a Ceph client for a worker, which can open no file: ceph.conf, the key, monitors' addresses.

Must not load Ceph's library, nor connect to anything.

Settings about files, logs and programs of this host are not handed over (`_HANDED_OVER` says which are). Names of
monitors are resolved here, too, since a worker could ask no name server.

Source: src/common/ConfUtils.cc of Ceph 16.2 for the grammar, in which a comment ends a value even within quotes;
the tests compare the result with what `ceph-conf` makes of a file.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from xenbackend.block.servers import Account
from xenbackend.errors import DriverError, printable

MAX_FILE = 1 << 20  # bytes of ceph.conf, or of a keyring
_MOST, _MOST_TEXT = 1000, 64 << 10  # settings that are handed over, and their characters: they fit into a message
_HANDED_OVER = re.compile(r"(?:auth|cephx|mon_client|ms|objecter|rados|rbd)_.*|fsid")
_KEYRINGS = "/etc/ceph/$cluster.$name.keyring,/etc/ceph/$cluster.keyring,/etc/ceph/keyring,/etc/ceph/keyring.bin"
_SECTION = re.compile(r"\[([^\]#;\\]+)\]\s*(?:[#;].*)?")
_KEY = re.compile(r"\s*([^=\[\]#;\\\s][^=\[\]#;\\]*?)\s*=[ \t]*")
_METAVARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_MONITOR = re.compile(r"((?:any:|v1:|v2:)?)(\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]/]+)((?::\d+)?(?:/\d+)?)")

Sections = Mapping[str, Mapping[str, str]]


def read_settings(account: Account) -> dict[str, str]:
    """Return the settings for librados for a user, by the names of its options, ``key`` and ``mon_host`` among them.

    Raises: DriverError, naming the file that cannot be used; OSError, about a file.
    """
    sections = _read(account.conf)
    name = f"client.{account.user}"
    found: dict[str, str] = {}
    for section in ("global", "client", name):
        found |= sections.get(section, {})
    known = {
        "cluster": Path(account.conf).stem if account.conf.endswith(".conf") else "ceph",
        "type": "client", "id": account.user, "name": name, "host": socket.gethostname().partition(".")[0],
    }  # fmt: skip
    settings = {each: value for each, value in found.items() if _HANDED_OVER.fullmatch(each)}
    monitors = _expanded(found.get("mon_host", ""), found, known)
    if not monitors:
        raise DriverError(f"{account.conf} names no monitor; add `mon host`", path=account.conf, errno=errno.ENODATA)
    settings["mon_host"] = resolve_monitors(monitors)
    key = _key(name, found, known, account)
    if key:
        settings["key"] = key
    if len(settings) > _MOST or sum(map(len, settings.values())) > _MOST_TEXT:
        raise DriverError(f"{account.conf} has more settings than a client of a cluster can have", path=account.conf)
    return settings


def boot_id() -> str:
    """Return an id that only this boot of this host has. Source: random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def resolve_monitors(text: str) -> str:
    """Return `mon host` with addresses in the place of names. Raises: DriverError, if a name is not known."""
    return _MONITOR.sub(_resolved, text)


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return the options of a file by section and name, as Ceph reads it. Raises: ValueError, naming the line."""
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] | None = None
    for number, line in _lines(text):
        stripped = line.strip()
        if not stripped or stripped[0] in "#;":
            continue
        if section := _SECTION.fullmatch(stripped):
            current = sections.setdefault(section[1], {})
        elif current is not None and (key := _KEY.match(line)):
            value = _value(line[key.end() :])
            if value is None:
                raise ValueError(f"line {number}: a quoted value has no end, or something follows it")
            current["_".join(key[1].split())] = value
        else:
            raise ValueError(f"line {number} is neither [section] nor name = value")
    return sections


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, joining a line that ends with a backslash to the next one, but not a comment."""
    whole, first = "", 0
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        first = first if whole else number
        ends = (whole + line).rstrip("\\")
        is_comment = (whole + line).lstrip()[:1] in ("#", ";")
        if (len(whole + line) - len(ends)) % 2 and not is_comment:
            whole += line[:-1]
            continue
        yield first, whole + line
        whole = ""
    if whole:
        yield first, whole


def _value(text: str) -> str | None:
    """Return the value at the beginning of a text, up to a comment; None if it is quoted wrongly."""
    quote = text[:1] if text[:1] in ("'", '"') else ""
    found, place = [], len(quote)
    while place < len(text) and text[place] not in "#;" and not (quote and text[place] == quote):
        place += text[place] == "\\" and place + 1 < len(text)
        found.append(text[place])
        place += 1
    if not quote:
        return "".join(found).rstrip()
    rest = text[place + 1 :].strip()
    return "".join(found) if text[place : place + 1] == quote and (not rest or rest[0] in "#;") else None


def _key(name: str, found: Mapping[str, str], known: Mapping[str, str], account: Account) -> str:
    """Return the user's key, from the place that the configuration names; empty if none is needed."""
    if found.get("key"):
        return found["key"]
    if file := found.get("keyfile"):
        return _text(_expanded(file, found, known)).strip()
    places = [each for each in re.split(r"[;,=\s]+", _expanded(found.get("keyring", _KEYRINGS), found, known)) if each]
    for place in places:
        try:
            key = _read(place).get(name, {}).get("key", "")
        except FileNotFoundError:
            continue
        if key:
            return key
        break  # as in librados: only the first keyring that exists counts
    if "none" in re.split(r"[;,=\s]+", found.get("auth_client_required", "")):
        return ""
    raise DriverError(
        f"there is no key for {name} in {', '.join(map(printable, places))}, which {printable(account.conf)} names; "
        f"an administrator of the cluster gets it by `ceph auth get {name}`",
        path=account.conf,
        errno=errno.EACCES,
    )


def _read(path: str) -> Sections:
    try:
        return parse(_text(path))
    except ValueError as problem:
        raise DriverError(f"{printable(path)} cannot be parsed: {problem}", path=path) from None


def _text(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123 - the name as it is
        if not os.path.isfile(path):  # noqa: PTH113 - the same
            raise DriverError(f"{printable(path)} is not a file", path=path)
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise DriverError(f"{printable(path)} has more than {MAX_FILE} bytes, too many for a configuration", path=path)
    return data.decode(errors="surrogateescape")


def _expanded(text: str, found: Mapping[str, str], known: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return known.get(name, found.get(name, match[0]))

    return _METAVARIABLE.sub(value, text)


def _resolved(match: re.Match[str]) -> str:
    kind, host, port = match.groups()
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        pass
    else:
        return match[0]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        problem = f"the monitor {printable(host)} cannot be found: {error.strerror}"
        raise DriverError(problem, errno=errno.EHOSTUNREACH) from error
    addresses = dict.fromkeys(str(each[4][0]) for each in found)
    return ",".join(f"{kind}[{each}]{port}" if ":" in each else f"{kind}{each}{port}" for each in addresses)
