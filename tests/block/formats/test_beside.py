"""The header of the files that filters keep beside a disk."""

from __future__ import annotations

from typing import ClassVar

import pytest

from xenbackend.block.formats import beside, cow
from xenbackend.errors import DriverError


class Other(beside.Header):
    """The header of another layer's file."""

    LAYER: ClassVar[str] = "other"
    MAGIC: ClassVar[bytes] = b"of another layer"


def test_a_file_of_another_layer_is_left_as_it_is() -> None:
    """Each layer recognizes its own files by their magic. Another layer's file is refused and left unchanged."""
    with pytest.raises(DriverError, match="it is not a file of other:, and is left unchanged"):
        Other.parse(cow.Header(1 << 20, 4096, "", bytes(16)).pack())


def test_another_version_is_refused() -> None:
    """A file of another version is refused, and the error names both versions."""
    data = bytearray(cow.Header(1 << 20, 4096, "", bytes(16)).pack())
    data[16] = 9
    with pytest.raises(DriverError, match="it has version 9 of the format, but this program knows version 1"):
        cow.Header.parse(bytes(data))
