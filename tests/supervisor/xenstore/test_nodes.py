"""The operations on nodes, against a scripted answerer; the real thing is in contract/test_store.py."""

import os
from collections.abc import Sequence

import pytest

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.nodes import Nodes, decode, encode


def test_values_of_any_bytes_become_text() -> None:
    """A value that is not UTF-8 is text all the same, so that no guest can make reading raise."""
    assert decode("größe".encode()) == "größe"
    assert decode(b"\xff\x00x") == "\udcff\x00x"


def test_file_names_that_are_not_utf8_come_through() -> None:
    """The name of a file is the same bytes after a toolstack has written and the service has read it."""
    assert encode(os.fsdecode(b"/img/\xff")) == b"/img/\xff"
    assert decode(b"/img/\xff") == os.fsdecode(b"/img/\xff")


def test_a_list_in_parts_starts_again_when_it_changed() -> None:
    """Parts of two generations are never joined: the list is read again from the start."""
    parts = iter([b"1\0a\0", b"2\0c\0\0", b"2\0a\0b\0", b"2\0c\0\0"])
    offsets = []

    def ask(operation: str, strings: Sequence[str], tail: bytes) -> bytes:
        if operation == "DIRECTORY":
            raise StoreError("too long", 7)
        offsets.append(strings[1])
        return next(parts)

    assert Nodes(ask).directory("/a") == ["a", "b", "c"]
    assert offsets == ["0", "2", "0", "4"]


def test_a_list_that_never_stands_still_is_given_up() -> None:
    """Whoever keeps changing a directory cannot keep a reader there for ever."""

    def ask(operation: str, strings: Sequence[str], tail: bytes) -> bytes:
        if operation == "DIRECTORY":
            raise StoreError("too long", 7)
        return b"%d\0a\0" % len(asked.append(operation) or asked)

    asked: list[str] = []
    with pytest.raises(StoreError, match="kept changing"):
        Nodes(ask).directory("/a")
