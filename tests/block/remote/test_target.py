"""Tests of `xenbackend.block.remote.target`: how an export is named."""

from __future__ import annotations

import pytest

from xenbackend.block.remote.target import parse_target

GOOD = {
    "unix:/run/a b,c": ("unix:/run/a b,c", None),
    "host:10809": ("host:10809", None),
    "[::1]:1": ("[::1]:1", None),
    "[fe80::1%lo]:1": ("[fe80::1%lo]:1", None),
    "nbd://host": ("host:10809", ""),
    "//host/": ("host:10809", ""),
    "nbd://Host:5/a": ("Host:5", "a"),
    "nbd://host/a%2Fb": ("host:10809", "a/b"),
    "nbd://host/a/b": ("host:10809", "a/b"),
    "nbd://host//x": ("host:10809", "/x"),
    "nbd://host/%257C%7C%2C%20+": ("host:10809", "%7C|, +"),
    "nbd://[::1]/x": ("[::1]:10809", "x"),
    "nbd://[fe80::1%25lo]:7/x": ("[fe80::1%lo]:7", "x"),
    "nbd://[::ffff:127.0.0.1]": ("[::ffff:127.0.0.1]:10809", ""),
    "nbd+unix:///?socket=/run/s": ("unix:/run/s", ""),
    "nbd+unix:///a?socket=/run/a%20b": ("unix:/run/a b", "a"),
    "nbd+unix:////x?socket=/s": ("unix:/s", "/x"),
}
BAD = {
    "": "not one of",
    "host": "not one of",
    "host:": "not a port",
    "host:0": "not a port",
    "host:65536": "not a port",
    "host:٣": "not a port",
    ":1": "not one of",
    "::1:1": "brackets",
    "[::1:1": "bracket",
    "unix:relative": "absolute path",
    "unix:/" + 107 * "a": "too long",
    "nbds://host/?tls-psk-file=/x": "tls-psk-file asks for TLS by a key that both share",
    "nbds://host/?tls-verify-peer=false": "could be anybody",
    "nbds://host/?x=1": "x is not known",
    "http://host": "schemes",
    "nbd://host/a b": "%20",
    "nbd://host:x/": "not a URI",
    "nbd://": "not nbd://",
    "nbd://user@host/": "user",
    "nbd://host/#x": "fragment",
    "nbd://host/?socket=/s": "not nbd://",
    "nbd://host/?tls-psk-file=/x": "tls-psk-file is not known",
    "nbd+unix:///x": "socket=",
    "nbd+unix://host/x?socket=/s": "socket=",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_is_written_is_what_is_meant(text: str) -> None:
    """Server and export are read as libnbd reads them. Each part of a URI is decoded once."""
    target = parse_target(text)
    assert GOOD[text] == (str(target.endpoint), target.export)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:1", (None, None)),
        ("nbd://host", (False, None)),
        ("nbds://host", (True, None)),
        ("nbds://host/a?tls-certificates=/a%20b", (True, "/a b")),
        ("nbds+unix:///?socket=/s&tls-certificates=/c", (True, "/c")),
    ],
)
def test_a_uri_says_whether_tls_is_wanted(text: str, expected: tuple[bool | None, str | None]) -> None:
    """A URI's scheme says whether TLS is wanted, and its query may name the certificates. Otherwise options do."""
    target = parse_target(text)
    assert expected == (target.tls, target.certificates)


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_is_refused_in_a_sentence(text: str) -> None:
    """A text that libnbd would refuse, or would understand in another way, is refused."""
    with pytest.raises(ValueError, match=BAD[text]):
        parse_target(text)


@pytest.mark.parametrize("text", ["unix:/run/s", "host:1", "[::1]:1"])
def test_what_is_shown_can_be_written(text: str) -> None:
    """The text of an endpoint can be written in a chain."""
    assert text == str(parse_target(str(parse_target(text).endpoint)))
