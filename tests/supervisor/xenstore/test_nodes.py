"""The operations on nodes, against a scripted answerer; the real thing is in contract/test_store.py."""

import errno
import os
from collections.abc import Sequence

import pytest

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.nodes import Nodes, decode, encode, error_of


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


@pytest.mark.parametrize(
    ("word", "number", "says"),
    [
        (b"ENOENT\0", errno.ENOENT, "No such file"),
        (b"ENOSPC\0", errno.ENOSPC, "quota for this domain"),
        (b"EQUOTA\0", errno.ENOSPC, "quota for this domain"),
        (b"what?\xff", errno.EIO, "error"),
    ],
)
def test_an_error_is_a_word(word: bytes, number: int, says: str) -> None:
    """Both xenstoreds' words for a quota that is used up say so; what is no word of theirs is an error all the same."""
    error = error_of("xenstore: write /a", word)

    assert (number, True) == (error.errno, "xenstore: write /a" in str(error) and says in str(error))


def test_what_may_not_be_read_is_not_there() -> None:
    """A domain that is not told whether a node is gone takes it for gone; any other error stays one."""
    words = iter([b"EACCES", b"ENOENT", b"EIO"])

    def ask(_operation: str, _strings: Sequence[str], _tail: bytes) -> bytes:
        raise error_of("xenstore: read /a", next(words))

    nodes = Nodes(ask)

    assert [None, None] == [nodes.read_if_allowed("/a"), nodes.read_if_allowed("/a")]
    with pytest.raises(StoreError, match="/a"):
        nodes.read_if_allowed("/a")
