"""Which image a text names."""

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
    """The driver gives the format, and its target is the file."""
    image = find_image(text)

    assert (image_format, path) == (image.format, image.path)


@pytest.mark.parametrize("text", ["log:|aio:/x", "ram:1M", "null:1M"])
def test_a_chain_is_no_image(text: str) -> None:
    """Filters, and sources without a file, are refused with what can be written instead."""
    with pytest.raises(ConfigError, match="write one of aio:FILE, vhd:FILE"):
        find_image(text)


def test_a_file_alone_is_refused_with_a_hint(tmp_path: Path) -> None:
    """A file name without a driver is never guessed at. The error says what to write if it is what it looks like."""
    path = tmp_path / "a,b"
    path.write_bytes(b"QFI\xfb" + struct.pack(">I", 3) + bytes(600))

    with pytest.raises(ConfigError, match=r"write qcow2:.*if that is what it is"):
        find_image(str(path))
    with pytest.raises(ConfigError, match="write the driver before it"):
        find_image("/none")
    with pytest.raises(ChainError):
        find_image("qcow3:/x")


def test_a_format_can_be_demanded() -> None:
    """If a command accepts only some formats, others are refused."""
    with pytest.raises(ConfigError, match="write one of vhd:FILE"):
        find_image("aio:/x", ("vhd",))


def test_any_name_becomes_a_layer() -> None:
    """Any file name can be written as a layer. For another path, the options are kept."""
    image = image_of_file("qcow2", "/a|b,c", "cache=on")

    assert "/a|b,c" == find_image(image.text).path
    assert at_another_path(image, "log:x").text == r"qcow2:log\:x,cache=on"


def test_a_driver_is_told_from_a_file() -> None:
    """A text that begins with a word and a colon is a chain."""
    assert [True, True, False, False] == [has_driver(each) for each in ("aio:x", "qcow2:/x", "/a:b", "./x")]
