"""Tests of `xenbackend.protocol.messages`: what a text in a message means."""

from __future__ import annotations

import pytest

from xenbackend.protocol.messages import own_snapshot


@pytest.mark.parametrize(
    ("file", "name"),
    [("@monday", "monday"), ("@", ""), ("@@a", "@a"), ("/img/@monday", None), ("./@monday", None), ("", None)],
)
def test_a_snapshot_of_the_image_itself_begins_with_an_at(file: str, name: str | None) -> None:
    """A text that begins with @ names a snapshot within the image; any other text is a file."""
    assert name == own_snapshot(file)
