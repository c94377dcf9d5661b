"""Tests of `xenbackend.block.formats.vhd_names`."""

from __future__ import annotations

import pytest

from tests import vhd_images
from tests.block.formats.test_vhd import reader
from xenbackend.block.formats import vhd
from xenbackend.block.formats.vhd import Locator
from xenbackend.block.formats.vhd_names import parent_names, space_of


def names_of(*names: tuple[bytes, bytes]) -> list[str]:
    """Return the names that an image with these locators gives for its parent."""
    data = vhd_images.image(8 << 20, parent_uuid=b"p" * 16, names=names)
    footer, _ = vhd.read_footer(reader(data), len(data))
    return parent_names(reader(data), vhd.read_header(reader(data), footer, len(data)), len(data))


def utf16(text: str) -> bytes:
    """Return a text in the encoding of locators."""
    return text.encode("utf-16-le")


def test_as_blktap_writes_it() -> None:
    """Blktap writes the relative path in three locators, which give one name."""
    assert ["./base.vhd", "base.vhd"] == names_of(
        (b"MacX", b"file://./base.vhd"), (b"W2ku", utf16(r".\base.vhd")), (b"W2ru", utf16(r".\base.vhd"))
    )


def test_as_windows_writes_it() -> None:
    """The order is: the relative path, the header's name, the absolute path without its drive."""
    absolute = (b"W2ku", utf16("C:\\images\\base.vhd"))

    assert ["./base.vhd", "base.vhd", "/images/base.vhd"] == names_of(absolute, (b"W2ru", utf16(".\\base.vhd")))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (b"file:///img/a.vhd", ["base.vhd", "/img/a.vhd"]),
        (b"file://localhost/img/a%20b.vhd", ["base.vhd", "/img/a%20b.vhd", "/img/a b.vhd"]),
        (b"file://./a.vhd\0\0", ["./a.vhd", "base.vhd"]),
        (b"http://host/a.vhd", ["base.vhd"]),
        (b"\xff\xfe", ["base.vhd"]),
        (b"file://a\0b", ["base.vhd"]),
    ],
)
def test_urls(url: bytes, expected: list[str]) -> None:
    """Only the path of a file URL is a name: as it stands, and unquoted."""
    assert expected == names_of((b"MacX", url))


@pytest.mark.parametrize("locator", [(1, 600, 4096), (0, 20, 4096), (512, 20, 1 << 60), (1 << 31, 1 << 31, 0)])
def test_locators_that_lead_nowhere(locator: tuple[int, int, int]) -> None:
    """A locator that is longer than its space, too long, or outside of the file is skipped without reading it."""
    space, length, offset = locator
    header = vhd.Header(1536, 4, 2 << 20, locators=(Locator(b"W2ru", space, length, offset),))

    assert [] == parent_names(lambda *_: pytest.fail("it was read"), header, 8192)


def test_space_in_sectors_or_bytes() -> None:
    """A locator's space counts sectors by the specification, and bytes in images of Windows and blktap."""
    assert (512, 1024, 1024) == tuple(space_of(Locator(b"W2ru", space, 9, 0)) for space in (1, 2, 1024))
