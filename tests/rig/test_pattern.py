"""Sectors that identify their place, and the model of a disk."""

from __future__ import annotations

from random import Random

import pytest

from xenbackend.blkif.abi import BLKIF_OP_DISCARD, BLKIF_OP_READ, BLKIF_OP_WRITE
from xenbackend.rig.pattern import DiskModel, Step, WrongData, describe, make
from xenbackend.units import SECTOR

SEED = 3


@pytest.fixture
def model() -> DiskModel:
    """A disk of 64 sectors."""
    return DiskModel(SEED, 64, Random(1))


def finished_write(model: DiskModel, sector: int, count: int, status: int = 0) -> Step:
    """Write sectors, as a backend that answers `status`."""
    step = model.step(BLKIF_OP_WRITE, sector, count)
    model.finish(step, status)
    return step


def test_sectors_differ() -> None:
    """Sectors of different place, generation or disk differ; generation 0 is zeros."""
    sectors = {
        make(seed, sector, [generation]) for seed in range(3) for sector in range(5) for generation in range(1, 5)
    }

    assert 60 == len(sectors)
    assert {SECTOR} == {len(sector) for sector in sectors}
    assert bytes(2 * SECTOR) == make(SEED, 7, [0, 0])


def test_a_disk_may_have_data_at_first() -> None:
    """`first` is the generation of all sectors at first; what is written later differs from it."""
    model = DiskModel(SEED, 64, Random(1), first=4)

    model.check(8, make(SEED, 8, [4] * 8))
    assert 5 == finished_write(model, 8, 8).generation
    with pytest.raises(WrongData, match="sector 8 holds generation 4 where generation 5 belongs"):
        model.check(8, make(SEED, 8, [4] * 8))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (bytes(SECTOR), "sector 7 holds zeros where generation 2 belongs"),
        (make(SEED, 7, [1]), "sector 7 holds generation 1 where generation 2 belongs"),
        (make(SEED, 8, [2]), "sector 7 holds generation 2 of sector 8 where generation 2 belongs"),
        (make(9, 7, [2]), "sector 7 holds a sector of another disk (seed 9) where generation 2 belongs"),
        (
            make(SEED, 7, [2])[:256] + make(SEED, 7, [1])[256:],
            "sector 7 holds a torn sector: generation 2 up to byte 256, then generation 1 where generation 2 belongs",
        ),
        (
            make(SEED, 7, [2])[:480] + bytes(32),
            "sector 7 holds a torn sector: generation 2 up to byte 480, then zeros where generation 2 belongs",
        ),
        (
            b"\xa5" * SECTOR,
            f"sector 7 holds foreign bytes ({'a5' * 16}…) where generation 2 belongs",
        ),
    ],
)
def test_faults_are_told_apart(data: bytes, sentence: str) -> None:
    """Stale, misplaced, foreign and torn sectors are each reported in a sentence of their own."""
    assert sentence == describe(data, SEED, 7, [2])


def test_last_write_counts(model: DiskModel) -> None:
    """A disk must hold the last completed write of each sector."""
    one, two = finished_write(model, 0, 4), finished_write(model, 2, 1)
    model.check(0, one.data[: 2 * SECTOR] + two.data + one.data[3 * SECTOR :])
    with pytest.raises(WrongData, match="sector 2 holds generation 1 where generation 2 belongs"):
        model.check(0, one.data)


def test_read_is_checked_where_it_lies(model: DiskModel) -> None:
    """A read's bytes are compared with the sectors that it named."""
    data = finished_write(model, 8, 8).data
    model.finish(model.step(BLKIF_OP_READ, 9, 2), 0, data[SECTOR : 3 * SECTOR])
    with pytest.raises(WrongData, match="generation 1 of sector 8"):
        model.finish(model.step(BLKIF_OP_READ, 9, 2), 0, data[: 2 * SECTOR])


def test_discarded_sector_is_old_or_zeros(model: DiskModel) -> None:
    """After a discard a sector may hold zeros or what it held, and nothing else."""
    old, new = finished_write(model, 0, 1), finished_write(model, 0, 1)
    model.finish(model.step(BLKIF_OP_DISCARD, 0, 1), 0)
    model.check(0, new.data)
    model.check(0, bytes(SECTOR))
    with pytest.raises(WrongData, match="where generation 2 or zeros belongs"):
        model.check(0, old.data)


def test_failed_write_is_old_or_new(model: DiskModel) -> None:
    """After a failed write each sector may hold what it held or the new contents; the failure is counted."""
    old, new = finished_write(model, 0, 2), finished_write(model, 0, 2, status=-1)
    model.check(0, old.data[:SECTOR] + new.data[SECTOR:])

    assert 1 == model.failures


def test_steps_in_flight_never_conflict(model: DiskModel) -> None:
    """Steps in flight overlap only where all of them read, and stay inside the disk."""
    model.operations = (BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_DISCARD)
    model.max_count = 5
    random = Random(2)
    in_flight: list[Step] = []
    for _ in range(500):
        step = model.next_step()
        if step is not None:
            assert 0 <= step.sector < step.sector + step.count <= 64
            for other in in_flight:
                apart = step.sector + step.count <= other.sector or other.sector + other.count <= step.sector
                assert apart or step.operation == other.operation == BLKIF_OP_READ
            in_flight.append(step)
        if step is None or len(in_flight) > 8:
            done = in_flight.pop(random.randrange(len(in_flight)))
            model.finish(done, -1 if done.operation == BLKIF_OP_READ else 0)

    assert len(in_flight) > 1


def test_alignment(model: DiskModel) -> None:
    """Steps begin and end at multiples of the alignment asked for."""
    model.alignment = 8
    steps = [model.next_step() for _ in range(20)]

    assert {0} == {step.sector % 8 + step.count % 8 for step in steps if step is not None}
