"""What the read-only formats have in common."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import pytest

from tests import foreign_images
from tests.foreign_images import GRAIN, MIB
from tests.fuzzing import endure
from xenbackend.block.formats import vdi, vhdx, vmdk
from xenbackend.block.formats.layout import Shape, check_places, power_of
from xenbackend.block.mapped.tables import READABLE, ZERO
from xenbackend.errors import DriverError


def test_how_many_tables() -> None:
    """The last table may be used only in part."""
    assert [1, 1, 2] == [Shape(size, 16, 9, 0).tables for size in (512, 32 << 20, (32 << 20) + 512)]


@pytest.mark.parametrize(("number", "power"), [(1, 0), (512, 9), (0, -1), (513, -1), (-512, -1)])
def test_powers(number: int, power: int) -> None:
    """A number that is not a power of two gives -1."""
    assert power == power_of(number)


def test_places_behind_the_end() -> None:
    """A cluster that begins at or beyond the end of the file is refused."""
    check_places([0, ZERO, 512 | READABLE], 513)
    check_places([0, ZERO], 0)
    with pytest.raises(DriverError, match="at byte 512, but the file has only 512"):
        check_places([512 | READABLE], 512)


SMALL = {
    "vdi": (vdi.parse, foreign_images.vdi(4 * MIB, {1: b"v" * MIB}), range(1024)),
    "vmdk": (vmdk.parse, foreign_images.vmdk(4 * MIB, {1: b"v" * GRAIN}, parent="b"), range(21 * 512 + 2052)),
    "vmdk, COWD": (vmdk.parse_cowd, foreign_images.cowd(4 * MIB, {1: b"v" * 512}), range(2048 + 512 + 64)),
    "vhdx": (vhdx.parse, foreign_images.vhdx(4 * MIB, {1: b"v" * MIB}), range(2 * MIB, 2 * MIB + (65 << 10))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_any_bytes_are_an_image_or_a_sentence(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """R19: any bytes in headers and tables are accepted or raise DriverError, quickly and in little memory."""
    monkeypatch.setattr(vhdx, "crc32c", lru_cache(64)(vhdx.crc32c))  # same sums, undamaged parts only once
    chance = Random(request.config.getoption("--seed"))
    count = request.config.getoption("--requests") // 20
    parse, good, places = SMALL[name]
    interesting = [place for place in places if good[place]]
    data = bytearray(good)

    def damaged() -> bytes:
        data[places.start : places.stop + 8] = good[places.start : places.stop + 8]
        for _ in range(chance.randint(1, 4)):
            width = chance.choice([1, 2, 4, 8])
            place = chance.choice(interesting if chance.random() < 0.8 else places)
            value = chance.choice([0, 1, (1 << 8 * width) - 1, 1 << chance.randrange(8 * width), chance.randrange(256)])
            data[place : place + width] = value.to_bytes(width, "little")
        return data  # the same object each time: to copy it would take longer than the look at it

    def look(data: bytes) -> None:
        image = parse(lambda offset, length: bytes(data[offset : offset + length]), len(data))
        for number in {0, max(0, image.shape.tables - 1)} if image.shape.size else ():
            place, length = image.table_at(number)
            assert length <= 1 << 20
            image.decode(bytes(data[place : place + length]))

    assert 0 < endure(count, damaged, look) < count
