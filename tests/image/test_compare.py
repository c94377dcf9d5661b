"""Comparing the content of two chains, as qemu-img does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.image_content import disk_write, ignore
from xenbackend.block.spec import parse_chain
from xenbackend.errors import DriverError
from xenbackend.image.compare import Compared, compare
from xenbackend.image.create import create
from xenbackend.image.names import Image
from xenbackend.image.session import Session

Make = Callable[[str], Image]
MIB = 1 << 20


def compared(one: str, other: str) -> Compared:
    """Compare two chains."""
    return compare(parse_chain(one), parse_chain(other), ignore)


@pytest.mark.parametrize("image_format", ["vhd", "qcow2", "qcow"])
def test_formats_do_not_matter(made: Make, raw: Path, image_format: str) -> None:
    """The same disk in two formats is equal, whatever each of them stores of its zeros."""
    found = compared(f"aio:{raw}", made(image_format).text)

    assert Compared((5 * MIB, 5 * MIB), None) == found
    assert found.is_same(strict=True)


@pytest.mark.parametrize("seed", range(8))
def test_the_first_byte_that_differs_is_named(made: Make, raw: Path, seed: int) -> None:
    """The first byte that differs is found: in data, in zeros that only one image stores, at the edge of a piece."""
    chance = Random(seed)
    places = sorted(chance.choice([0, MIB - 1, MIB, 5 * MIB - 1, chance.randrange(5 * MIB)]) for _ in range(2))
    image = made(chance.choice(["vhd", "qcow2"]))
    for place in places:
        sector = place // 512 * 512
        data = bytearray(raw.read_bytes()[sector : sector + 512])
        data[place - sector] ^= 1
        disk_write(image.text, {sector: bytes(data)})

    assert places[0] == compared(image.text, f"aio:{raw}").differs_at
    assert places[0] == compared(f"aio:{raw}", image.text).differs_at


def test_a_file_that_ends_inside_a_sector(tmp_path: Path) -> None:
    """A file that ends inside a sector equals one with zeros up to the end of that sector, and no other."""
    odd, whole = tmp_path / "odd", tmp_path / "whole"
    odd.write_bytes(b"x" * (MIB + 100))
    whole.write_bytes(b"x" * (MIB + 100) + bytes(412))
    assert compared(f"aio:{odd}", f"aio:{whole}").is_same(strict=True)

    whole.write_bytes(b"x" * (MIB + 100) + bytes(411) + b"y")
    assert (
        MIB + 511
        == compared(f"aio:{odd}", f"aio:{whole}").differs_at
        == compared(f"aio:{whole}", f"aio:{odd}").differs_at
    )


def test_zeros_behind_the_end_are_the_same_unless_size_counts(raw: Path, tmp_path: Path) -> None:
    """A disk that is larger by zeros has the same content, except with `strict`. One larger by data does not."""
    larger = tmp_path / "larger"
    larger.write_bytes(raw.read_bytes() + bytes(3 * MIB))
    found = compared(f"aio:{raw}", f"aio:{larger}")
    assert (True, False) == (found.is_same(strict=False), found.is_same(strict=True))

    with larger.open("r+b") as file:
        file.seek(8 * MIB - 1)
        file.write(b"x")
    assert 8 * MIB - 1 == compared(f"aio:{raw}", f"aio:{larger}").differs_at
    assert 8 * MIB - 1 == compared(f"aio:{larger}", f"aio:{raw}").differs_at


def test_what_neither_has_is_not_read(tmp_path: Path) -> None:
    """Two empty disks of 100 GiB are equal without any read, even behind a filter that fails all reads."""
    one = create("qcow2", f"{tmp_path}/one", 100 << 30).text
    other = create("vhd", f"{tmp_path}/other", 100 << 30).text

    assert compared(f"fault:op=read|{one}", f"fault:op=read|{other}").is_same(strict=True)


@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_that_is_written_is_refused(made: Make, raw: Path) -> None:
    """An image that is being written is refused, because its content may change meanwhile."""
    image = made("qcow2")
    with Session() as session:
        session.open(image.chain, read_only=False)
        with pytest.raises(DriverError, match="locked by another process"):
            compared(image.text, f"aio:{raw}")
