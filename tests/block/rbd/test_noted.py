"""Tests of `xenbackend.block.rbd.noted`: a text for whoever comes next; that it is whole, `tests/test_note.py` sees."""

from __future__ import annotations

import pytest

from xenbackend.block.rbd.noted import SIZE, Noted
from xenbackend.block.rbd.target import MAX_NAME


def test_what_was_noted_is_there_for_whoever_comes_next() -> None:
    """A successor reads what was noted last, nothing in a memory of zeros; two who look see the same."""
    memory = memoryview(bytearray(SIZE))
    assert "" == Noted(memory).text
    reader = Noted(memory)
    for text in ("10.0.0.1:0/7", "", "ä"):
        Noted(memory).text = text
        assert text == reader.text == Noted(memory).text


@pytest.mark.parametrize("character", ["x", "\udcff", "\x01"])
def test_an_identity_fits(character: str) -> None:
    """The longest names that a chain may have leave room for the rest of what tells an image from any other."""
    memory = memoryview(bytearray(SIZE))
    text = "x" * 200 + 2 * MAX_NAME * character
    Noted(memory).text = text
    assert text == Noted(memory).text


@pytest.mark.parametrize("text", ["1", '{"text": 1}', "{}"])
def test_what_is_no_text_is_none(text: str) -> None:
    """What none of ours would write is read as nothing."""
    memory = memoryview(bytearray(SIZE))
    Noted(memory).text = text
    memory[64 : 64 + 8 + len(text)] = len(text).to_bytes(8, "little") + text.encode()
    assert "" == Noted(memory).text
