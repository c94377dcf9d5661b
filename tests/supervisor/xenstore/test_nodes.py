"""Operations on nodes, with scripted answers; tests with real xenstoreds are in contract/test_store.py."""

import errno
import os
from collections.abc import Sequence

import pytest

from xenbackend.errors import StoreError
from xenbackend.supervisor.xenstore.nodes import Nodes, decode, encode, error_of


def test_values_of_any_bytes_become_text() -> None:
    """A value that is not UTF-8 is decoded too, so that no guest can make reading raise an exception."""
    assert decode("größe".encode()) == "größe"
    assert decode(b"\xff\x00x") == "\udcff\x00x"


def test_file_names_that_are_not_utf8_come_through() -> None:
    """A file name that is not UTF-8 has the same bytes after a toolstack has written it and the service has read it."""
    assert encode(os.fsdecode(b"/img/\xff")) == b"/img/\xff"
    assert decode(b"/img/\xff") == os.fsdecode(b"/img/\xff")


def test_a_list_in_parts_starts_again_when_it_changed() -> None:
    """If a directory changes while its list is read in parts, the list is read again from the start."""
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
    """A directory that keeps changing is given up after some tries, with an error."""

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
    """Both xenstoreds' error words for an exhausted quota are understood; an unknown word is an error too."""
    error = error_of("xenstore: write /a", word)

    assert (number, True) == (error.errno, "xenstore: write /a" in str(error) and says in str(error))


def test_what_may_not_be_read_is_not_there() -> None:
    """A node that may not be read counts as gone, for a domain that is not told which; other errors are raised."""
    words = iter([b"EACCES", b"ENOENT", b"EIO"])

    def ask(_operation: str, _strings: Sequence[str], _tail: bytes) -> bytes:
        raise error_of("xenstore: read /a", next(words))

    nodes = Nodes(ask)

    assert [None, None] == [nodes.read_if_allowed("/a"), nodes.read_if_allowed("/a")]
    with pytest.raises(StoreError, match="/a"):
        nodes.read_if_allowed("/a")
