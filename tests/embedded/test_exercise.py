"""A guest that tries its disk finds what is wrong with it, and puts everything back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from driven import Driven

from xenbackend.embedded.exercise import Exercise, Phase
from xenbackend.errors import XenbackendError
from xenbackend.rig.frontend import Wishes
from xenbackend.rig.pattern import WrongData

WISHES = Wishes(persistent=True, indirect=64)
AREA = 1 << 20


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    """Return a worker and a guest without a disk yet."""
    with Driven(tmp_path) as made:
        yield made


def quiet(_: Phase) -> None:
    """Ignore a report of progress."""


def test_a_good_disk_is_verified_and_put_back(driven: Driven, tmp_path: Path) -> None:
    """After all phases the file holds its former contents, and all data moved were counted."""
    image = tmp_path / "disk.img"
    before = bytes(range(256)) * (2 * AREA // 256)
    image.write_bytes(before)
    exercise = Exercise(driven.connect(f"aio:{image}", WISHES), AREA, 1, quiet)
    exercise.save()
    exercise.fill()
    assert image.read_bytes()[:AREA] != before[:AREA]
    exercise.mix(0.05)
    exercise.verify()
    exercise.restore()
    whole: list[bytes] = []
    exercise.read_all(whole.append)

    assert image.read_bytes() == before
    assert b"".join(whole) == before
    assert [phase.moved for phase in exercise.phases if phase.total] == [AREA] * 5


def test_a_disk_that_forgets_is_found(driven: Driven) -> None:
    """A disk that takes every write but reads zeros is found out by the first read."""
    exercise = Exercise(driven.connect("null:1M", WISHES), AREA, 1, quiet)
    exercise.fill()
    with pytest.raises(WrongData, match="holds zeros where generation"):
        exercise.verify()


def test_an_error_of_the_disk_ends_the_phase(driven: Driven) -> None:
    """A request that fails ends the phase with a sentence that says where."""
    exercise = Exercise(driven.connect("fault:op=write,skip=3|ram:1M", WISHES), AREA, 1, quiet)
    with pytest.raises(XenbackendError, match="answered -1 at sector"):
        exercise.fill()
