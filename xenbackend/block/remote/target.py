"""The syntax of an NBD export: a socket or a host with an export's name, or a URI as of libnbd.

Must not resolve a name. Each part of a URI is decoded once. Source: NetworkBlockDevice/nbd doc/uri.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from xenbackend.block.servers import Endpoint

PORT = 10809  # IANA's for NBD
_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
_PSK = "asks for TLS by a key that both share (PSK), which is not supported; write tls-certificates=DIRECTORY"
_NO_TLS = {
    "tls-psk-file": _PSK,
    "tls-username": _PSK,
    "tls-verify-peer": "cannot be left out: a server that is not verified could be anybody",
}
_URI = re.compile(r"^([a-z+]*):?//")
_MAX_PATH = 107  # bytes; sun_path of unix(7) has 108, with a NUL


@dataclass(frozen=True, slots=True)
class Target:
    """An export. A field is None if the text does not say, so that an option may.

    tls            whether TLS is used
    certificates   the directory with the certificates for TLS
    """

    endpoint: Endpoint
    export: str | None = None
    tls: bool | None = None
    certificates: str | None = None

    def __str__(self) -> str:
        return str(self.endpoint)


def parse_target(text: str) -> Target:
    """Parse ``unix:/path``, ``host:port`` or a URI. Raises: ValueError, with a sentence."""
    if uri := _URI.match(text):
        return _parse_uri(text if uri[1] else f"nbd:{text}")
    if text.startswith("unix:"):
        return Target(_unix(text.removeprefix("unix:")))
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"{text!r} is not one of unix:/PATH, HOST:PORT, nbd://HOST/EXPORT")
    return Target(_tcp(host, port))


def _parse_uri(text: str) -> Target:
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise ValueError(f"{text!r}: write a blank as %20 in a URI")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is not a URI: {error}") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"{text!r}: the schemes are {', '.join(_SCHEMES)}")
    if parts.username or parts.password or parts.fragment:
        raise ValueError(f"{text!r}: a user or a fragment has no meaning here; leave it out")
    export = unquote(parts.path.removeprefix("/"), errors="surrogateescape")
    query = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
    tls = parts.scheme.startswith("nbds")
    for name in sorted(query.keys() - ({"socket", "tls-certificates"} if tls else {"socket"})):
        raise ValueError(f"{text!r}: {name} {(_NO_TLS if tls else {}).get(name, 'is not known in a URI')}")
    certificates = query.get("tls-certificates")
    if parts.scheme.endswith("+unix"):
        if parts.netloc or "socket" not in query:
            raise ValueError(f"{text!r} is not nbd+unix:///EXPORT?socket=/PATH")
        return Target(_unix(query["socket"]), export, tls, certificates)
    if "socket" in query or not parts.hostname:
        raise ValueError(f"{text!r} is not nbd://HOST:PORT/EXPORT")
    host = parts.netloc.rpartition("@")[2]
    host = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    return Target(_endpoint(unquote(host), PORT if port is None else port), export, tls, certificates)


def _unix(path: str) -> Endpoint:
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not the absolute path of a socket")
    if "\0" in path or len(path.encode(errors="surrogateescape")) > _MAX_PATH:
        raise ValueError(f"{path!r} is too long for a socket; {_MAX_PATH} bytes fit")
    return Endpoint(path=path)


def _tcp(host: str, port: str) -> Endpoint:
    if not (port.isascii() and port.isdecimal()):
        raise ValueError(f"{port!r} is not a port; write HOST:PORT")
    if host.startswith("[") != host.endswith("]"):
        raise ValueError(f"{host!r} has one bracket")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and bare == host:
        raise ValueError(f"{host!r} is written in brackets before a port, as in [::1]:{PORT}")
    return _endpoint(bare, int(port))


def _endpoint(host: str, port: int) -> Endpoint:
    if not host or re.search(r"[\s\x00/]", host):
        raise ValueError(f"{host!r} is not a host name")
    if not 0 < port < 65536:
        raise ValueError(f"{port} is not a port")
    return Endpoint(host=host, port=port)
