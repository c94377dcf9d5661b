"""The ring fuzzer against a worker's process behind its walls."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ring_fuzz import messages
from tests.ring_fuzz.__main__ import CORPUS
from tests.ring_fuzz.bed import Violation
from tests.ring_fuzz.episode import Tally
from tests.ring_fuzz.far import FarBed, FarEpisode

pytestmark = pytest.mark.slow
MESSAGES = 4000


class Killed(FarEpisode):
    """An episode whose worker is killed at the beginning."""

    def _batch(self, count: int) -> None:
        if not self.number:
            os.kill(self.bed.worker, signal.SIGKILL)
        super()._batch(count)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[FarBed]:
    """Return a host."""
    with FarBed(tmp_path) as bed:
        yield bed


@pytest.mark.rows("B10", "R1", "R7", "R20")
def test_a_worker_behind_its_walls_bears_what_a_guest_writes(bed: FarBed, request: pytest.FixtureRequest) -> None:
    """Each message has its one answer, which is right; a ring that is broken is stopped with a sentence. The worker
    lives on, and neither the other ring, nor the other half of the disk, nor another guest's disk notices anything.
    """
    seed, tally, number = request.config.getoption("--seed"), Tally(), 0
    while tally.counts.get("messages", 0) < MESSAGES or not tally.counts.get("stopped rings"):
        FarEpisode(bed, seed, number, messages.read(CORPUS), tally).run()
        number += 1

    assert tally.counts["rewritten"] > 0
    assert tally.counts["episodes"] == number
    assert bed.other.finished > 0


def test_a_worker_that_ends_is_noticed(bed: FarBed) -> None:
    """However well its successor goes on: no message may be the end of a worker."""
    episode = Killed(bed, 1, 0, [], Tally())
    with pytest.raises(Violation, match="the worker was"):
        episode.run(50)


def test_a_wrong_answer_is_noticed(bed: FarBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the judge says is compared with what the process answers."""
    monkeypatch.setattr("tests.ring_fuzz.judge._MOST_DIRECT", 3)
    with pytest.raises(Violation, match="was answered"):
        FarEpisode(bed, 1, 0, [], Tally()).run(2000)
