"""Tests of `xenbackend.note`: a note is read back whole or not at all, whatever the memory holds."""

from __future__ import annotations

import pytest

from xenbackend.note import Note
from xenbackend.units import PAGE

SIZE = 18 * PAGE
NOTE = Note(PAGE, 2, (2 * PAGE, 10 * PAGE), 8 * PAGE, 3)


@pytest.fixture
def memory() -> memoryview:
    """Memory that nobody has written to."""
    return memoryview(bytearray(SIZE))


def test_note_is_found_again(memory: memoryview) -> None:
    """A note is read back as it was written, replaced as a whole, and deleted."""
    NOTE.write(memory, {"vbd": "vbd/5/51712", "rings": list(range(100))})
    NOTE.write(memory, {"vbd": "x" * 30_000})
    longest = NOTE.read(memory)
    NOTE.write(memory, {"vbd": "ä"})

    assert ({"vbd": "x" * 30_000}, {"vbd": "ä"}) == (longest, NOTE.read(memory))
    NOTE.write(memory, None)
    assert NOTE.read(memory) is None


def test_memory_that_no_worker_wrote_has_no_note(memory: memoryview) -> None:
    """Zeros, another version or an impossible copy count as no note."""
    assert NOTE.read(memory) is None
    for word, value in ((0, 1), (1, 99), (2, 3)):
        NOTE.write(memory, {})
        memory[PAGE : 2 * PAGE].cast("Q")[word] = value
        assert NOTE.read(memory) is None


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[1]", b"1", b"null", b'"text"', b"{", b"\xff", b"[" * 32_000, b'{"a":' * 5000, b"9" * 32_000,
        b"{\0}", b'{"a": 1} {"b": 2}',
    ],
)  # fmt: skip
def test_what_is_no_note_is_none(memory: memoryview, text: bytes) -> None:
    """A text that our code would not write, however deeply nested, counts as no note."""
    NOTE.write(memory, {})
    memory[2 * PAGE : 2 * PAGE + 8 + len(text)] = len(text).to_bytes(8, "little") + text

    assert NOTE.read(memory) is None


@pytest.mark.parametrize("length", [8 * PAGE - 7, 2**32, 2**63, 2**64 - 1])
def test_a_length_that_no_note_has_is_none(memory: memoryview, length: int) -> None:
    """A length beyond the note's place counts as no note."""
    NOTE.write(memory, {})
    memory[2 * PAGE : SIZE] = length.to_bytes(8, "little") + b"{}".ljust(16 * PAGE - 8)

    assert NOTE.read(memory) is None


def test_note_that_is_too_long_is_refused(memory: memoryview) -> None:
    """A note that does not fit is an error, and the former note stays."""
    NOTE.write(memory, {"x": 1})
    with pytest.raises(ValueError, match="do not fit"):
        NOTE.write(memory, {"x": "y" * 8 * PAGE})
    assert {"x": 1} == NOTE.read(memory)


@pytest.mark.parametrize("size", [10, 3000])
def test_note_survives_a_death_while_it_is_written(memory: memoryview, size: int) -> None:
    """Until the word that makes a note valid is written, the former note is read."""
    NOTE.write(memory, {"old": "o" * size})
    before = memory[:SIZE].tobytes()
    NOTE.write(memory, {"new": "n" * size})
    after = memory[:SIZE].tobytes()
    changed = [place for place in range(PAGE, SIZE) if before[place] != after[place]]
    memory[:SIZE] = before
    for place in sorted(changed, key=lambda place: place < 2 * PAGE):  # the word last
        assert {"old": "o" * size} == NOTE.read(memory)
        memory[place] = after[place]

    assert {"new": "n" * size} == NOTE.read(memory)
