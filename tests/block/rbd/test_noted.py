"""Tests of `xenbackend.block.rbd.noted`: a text that is whole whenever the process is killed."""

from __future__ import annotations

import pytest

from xenbackend.block.rbd.noted import MAX_TEXT, SIZE, Noted
from xenbackend.block.rbd.target import MAX_NAME


def test_what_was_noted_is_there_for_whoever_comes_next() -> None:
    """A successor reads what was noted last, nothing in a memory of zeros."""
    memory = memoryview(bytearray(SIZE))
    assert "" == Noted(memory).text
    for text in ("10.0.0.1:0/7", "", "ä", "x" * MAX_TEXT):
        noted = Noted(memory)
        noted.text = text
        assert text == noted.text == Noted(memory).text


def test_a_text_is_there_whole_or_not_at_all() -> None:
    """However many bytes of a note were written when the process was killed, the one before it is there, or it."""
    memory = memoryview(bytearray(SIZE))
    for text in ("first", "second"):
        Noted(memory).text = text
    before = bytes(memory)
    Noted(memory).text = "third"
    after = bytes(memory)
    changed = [place for place in range(SIZE) if before[place] != after[place]]
    for last in range(changed[0], changed[-1] + 2):
        torn = memoryview(bytearray(after[:last] + before[last:]))
        assert Noted(torn).text == ("third" if last > changed[-1] else "second")
        torn = memoryview(bytearray(before[:last] + after[last:]))
        assert Noted(torn).text == ("third" if last == changed[0] else "second")


def test_what_does_not_fit_is_refused() -> None:
    """A text that is too long changes nothing."""
    memory = memoryview(bytearray(SIZE))
    with pytest.raises(ValueError, match="does not fit"):
        Noted(memory).text = "x" * (MAX_TEXT + 1)
    assert bytes(SIZE) == bytes(memory)


def test_an_identity_fits() -> None:
    """The longest names that a chain may have leave room for the rest of what tells an image from any other."""
    assert 2 * MAX_NAME + 200 < MAX_TEXT
