"""Changes laid over a file that is only read."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, content, image, read
from xenbackend.block.mapped.changed import Change, ChangedFile, Changes

SIZE = 64 << 10


def model(changes: list[Change], data: bytes) -> bytes:
    """Return the bytes with the changes applied; the newest change comes first."""
    found = bytearray(data)
    for start, length, what in reversed(changes):
        found[start : start + length] = bytes(length) if what is None else what
    return bytes(found)


def some(chance: Random, count: int) -> list[Change]:
    """Return changes that overlap one another."""
    changes: list[Change] = []
    for _ in range(count):
        start, length = chance.randrange(SIZE - 8192), chance.randint(1, 8192)
        changes.append((start, length, None if chance.random() < 0.4 else chance.randbytes(length)))
    return changes


@pytest.mark.parametrize("seed", range(10))
def test_the_newest_counts(seed: int) -> None:
    """Where changes overlap, the newest is seen. Where there are none, the file is."""
    chance = Random(seed)
    data, changes = chance.randbytes(SIZE), some(chance, chance.randint(0, 40))
    seen = Changes(changes).reader(lambda offset, length: data[offset : offset + length], SIZE)
    expected = model(changes, data)

    assert expected == seen(0, 2 * SIZE)
    for _ in range(50):
        offset, length = chance.randrange(SIZE), chance.randint(0, 9000)
        assert expected[offset : offset + length] == seen(offset, length)


def test_what_is_newest_is_kept_once() -> None:
    """Parts of changes that newer ones cover are not kept, and each newer change is not searched one by one."""
    changes = Changes([(0, SIZE, None), *((place, 512, b"x" * 512) for place in range(0, SIZE, 512))])

    assert (1, SIZE) == (len(changes), changes.end)


@pytest.mark.slow
def test_many_changes() -> None:
    """Thousands of overlapping changes are sorted quickly."""
    many = [((1 << 20) - number, 2 * number + 1, None) for number in range(1 << 14)]

    assert 2 * (1 << 14) - 1 == len(Changes(many))


def test_a_file_seen_with_changes(machine: Machine, tmp_path: Path) -> None:
    """Requests and direct reads see the file with its changes, and zeros up to its new end. The file stays as it is."""
    chance = Random(3)
    path = image(tmp_path / "file", SIZE)
    path.write_bytes(data := chance.randbytes(SIZE))
    changes = [*some(chance, 20), (SIZE + 4096, 512, b"n" * 512)]
    opened = machine.files.open(str(path), read_only=True, direct=False, sector_size=4096)
    file = ChangedFile(opened, Changes(changes), SIZE + 8192)
    assert (4096, opened.physical_sector_size) == (file.sector_size, file.physical_sector_size)
    requests = [read(chance.randrange(SIZE // 512) * 512, 512, 1024, 2048) for _ in range(30)]
    requests.append(read(SIZE - 4096, 4096, 8192))

    assert [0] * 31 == machine.do(file, *requests)
    expected = model(changes, data.ljust(SIZE + 8192, b"\0"))
    for request in requests:
        assert expected[request.offset :][: request.length] == content(request)
    assert (expected[-4200:], b"") == (file.read_at(SIZE + 8192 - 4200, 9000), file.read_at(SIZE + 8192, 1))
    for refused in (lambda: file.write_at(0, b"x"), lambda: file.grow(2 * SIZE)):
        with pytest.raises(OSError, match="only read"):
            refused()
    file.sync()
    file.close()
    assert data == path.read_bytes()


def test_data_of_a_file_with_changes(machine: Machine, tmp_path: Path) -> None:
    """Data are where the file has some or a change brings some. Zeros that a change brings may count as data."""
    path = image(tmp_path / "file", SIZE)
    with path.open("r+b") as file:
        file.seek(16384)
        file.write(b"x" * 8192)
    opened = machine.files.open(str(path), read_only=True, direct=False)
    changes = [(4096, 4096, b"a" * 4096), (20480, 512, b"b" * 512), (28672, 4096, None), (SIZE + 4096, 512, b"c" * 512)]
    file = ChangedFile(opened, Changes(changes), SIZE + 8192)
    found, place = [], 0
    while place < file.size:
        found.append(file.next_data(place))
        place = found[-1][1]
    allocated = file.allocated
    inside = file.next_data(4608)
    file.close()

    size = SIZE + 8192
    assert (4608, 8192) == inside
    assert [(4096, 8192), (16384, 24576), (SIZE + 4096, SIZE + 4608), (size, size)] == found
    assert allocated == path.stat().st_blocks * 512


def test_a_read_that_failed_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    """If the file cannot be read, the request's buffer gets none of the changes either."""
    path = image(tmp_path / "file", SIZE)
    opened = machine.files.open(str(path), read_only=True, direct=False, blocking=True)
    file = ChangedFile(opened, Changes([(0, 512, b"n" * 512)]), SIZE)
    path.write_bytes(b"")
    request = read(0, 4096)

    assert [5] == machine.do(file, request)
    assert b"\xee" * 4096 == content(request)
    file.close()
