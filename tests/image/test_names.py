"""Which image a text means."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from xenbackend.errors import ChainError, ConfigError
from xenbackend.image.names import at_another_path, find_image, has_driver, image_of_file


@pytest.mark.parametrize(
    ("text", "image_format", "path"),
    [
        ("vhd:/a.vhd", "vhd", "/a.vhd"),
        ("qcow2:b,parents=/", "qcow2", "b"),
        ("tap2:qcow:c", "qcow", "c"),
        ("aio:d", "raw", "d"),
        ("sync:d", "raw", "d"),
    ],
)
def test_a_layer_names_format_and_file(text: str, image_format: str, path: str) -> None:
    """The format is the driver's, and the file is its target."""
    image = find_image(text)

    assert (image_format, path) == (image.format, image.path)


@pytest.mark.parametrize("text", ["log:|aio:/x", "ram:1M", "null:1M"])
def test_a_chain_is_no_image(text: str) -> None:
    """Filters, and sources without a file, are refused with what could be written."""
    with pytest.raises(ConfigError, match="write one of aio:FILE, vhd:FILE"):
        find_image(text)


def test_a_file_alone_is_refused_with_a_hint(tmp_path: Path) -> None:
    """A bare file is never taken for what it looks like: the sentence says what to write if it is that."""
    path = tmp_path / "a,b"
    path.write_bytes(b"QFI\xfb" + struct.pack(">I", 3) + bytes(600))

    with pytest.raises(ConfigError, match=r"write qcow2:.*if that is what it is"):
        find_image(str(path))
    with pytest.raises(ConfigError, match="write the driver before it"):
        find_image("/none")
    with pytest.raises(ChainError):
        find_image("qcow3:/x")


def test_a_format_can_be_demanded() -> None:
    """Where only some formats make sense, the others are refused."""
    with pytest.raises(ConfigError, match="write one of vhd:FILE"):
        find_image("aio:/x", ("vhd",))


def test_any_name_becomes_a_layer() -> None:
    """A file may be called anything; its options go along to another file."""
    image = image_of_file("qcow2", "/a|b,c", "cache=on")

    assert "/a|b,c" == find_image(image.text).path
    assert at_another_path(image, "log:x").text == r"qcow2:log\:x,cache=on"


def test_a_driver_is_told_from_a_file() -> None:
    """A text that begins with a word and a colon is a chain."""
    assert [True, True, False, False] == [has_driver(each) for each in ("aio:x", "qcow2:/x", "/a:b", "./x")]
