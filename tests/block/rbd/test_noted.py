"""Tests of `xenbackend.block.rbd.noted`: a text for the next worker. `tests/test_note.py` tests that it is whole."""

from __future__ import annotations

import pytest

from xenbackend.block.rbd.noted import SIZE, Noted
from xenbackend.block.rbd.target import MAX_NAME


def test_what_was_noted_is_there_for_whoever_comes_next() -> None:
    """A successor reads the text that was noted last, and an empty one from a new memory."""
    memory = memoryview(bytearray(SIZE))
    assert "" == Noted(memory).text
    reader = Noted(memory)
    for text in ("10.0.0.1:0/7", "", "ä"):
        Noted(memory).text = text
        assert text == reader.text == Noted(memory).text


@pytest.mark.parametrize("character", ["x", "\udcff", "\x01"])
def test_an_identity_fits(character: str) -> None:
    """With the longest names that a chain may have, there is still room for the rest of an image's identity."""
    memory = memoryview(bytearray(SIZE))
    text = "x" * 200 + 2 * MAX_NAME * character
    Noted(memory).text = text
    assert text == Noted(memory).text


@pytest.mark.parametrize("text", ["1", '{"text": 1}', "{}"])
def test_what_is_no_text_is_none(text: str) -> None:
    """Anything but a note of ours is read as an empty text."""
    memory = memoryview(bytearray(SIZE))
    Noted(memory).text = text
    memory[64 : 64 + 8 + len(text)] = len(text).to_bytes(8, "little") + text.encode()
    assert "" == Noted(memory).text
