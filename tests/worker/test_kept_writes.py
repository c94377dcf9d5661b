"""A disk whose writes go to a file of their own, for good or for a time, in a worker's process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driven import Driven
from xenbackend import counters
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE


def test_what_was_answered_outlives_the_worker(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """D11: answered writes that no flush has put into the map survive a kill; the image is unchanged."""
    text = f"cow:{tmp_path}/cow|aio:{images[0]}"
    driven.connect(text)
    for place in range(0, 256, 32):
        driven.frontend.write(place, DATA)
    driven.kill()
    driven.succeed(text, resumes=True)
    found = [driven.frontend.read(place, 8) for place in range(0, 256, 8)]
    driven.frontend.flush()
    driven.worker.expect_counter("flushes", 1)

    assert [DATA if place % 4 == 0 else bytes(PAGE) for place in range(32)] == found
    assert bytes(1 << 20) == images[0].read_bytes()
    assert [{"own": 2, "zeros": 0}] == counters.figures(driven.worker.journal, [["own", "zeros"]])
    driven.worker.end()


def test_a_chain_without_it_is_another_disk(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """Removing the layer would lose the writes, so that is refused, and so is a snapshot of the image, which is only
    read.
    """
    driven.connect(f"log:|cow:{tmp_path}/cow|aio:{images[0]}").write(0, DATA)
    refused = driven.worker.ask(messages.Swap(f"aio:{images[0]}"))
    branch = driven.worker.ask(messages.Branch(f"{images[0]}.leaf", ""))
    done = driven.worker.ask(messages.Swap(f"throttle:iops=1000|cow:{tmp_path}/cow|aio:{images[0]}"))

    assert (Code.INVALID, Code.INVALID, Code.OK) == (refused.code, branch.code, done.code), done.sentence
    assert "shows the image differently" in refused.sentence
    assert "which is only read" in branch.sentence
    assert DATA == driven.frontend.read(0, 8)


def test_what_a_cache_alone_has_outlives_the_worker(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """D11: with mode=writeback, answered writes survive a kill, and a snapshot, or a chain without the cache, is
    refused.
    """
    text = f"cache:{tmp_path}/cache,size=1M,mode=writeback|aio:{images[0]}"
    driven.connect(text)
    for place in range(0, 256, 32):
        driven.frontend.write(place, DATA)
    assert bytes(1 << 20) == images[0].read_bytes()
    driven.kill()
    driven.succeed(text, resumes=True)
    found = [driven.frontend.read(place, 8) for place in range(0, 256, 8)]
    branch = driven.worker.ask(messages.Branch(f"{images[0]}.leaf", ""))
    bare = driven.worker.ask(messages.Swap(f"aio:{images[0]}"))

    assert [DATA if place % 4 == 0 else bytes(PAGE) for place in range(32)] == found
    assert (Code.INVALID, Code.INVALID) == (branch.code, bare.code)
    assert "may hold data that the image does not have" in branch.sentence
    assert "shows the image differently" in bare.sentence
    driven.worker.end()


def test_what_a_cache_keeps_at_the_end_is_logged(driven: Driven, images: list[Path], tmp_path: Path) -> None:
    """If a cache still holds writes at the end, that is logged once, since somebody may take the image for the disk."""
    driven.connect(f"cache:{tmp_path}/cache,size=1M,mode=writeback|fault:op=write,errno=ENOSPC|aio:{images[0]}")
    driven.frontend.write(0, DATA)
    driven.worker.close()

    (line,) = driven.worker.lines
    assert "critical" == line.level
    assert "the layer cache-" in line.event
    assert (
        f"{tmp_path}/cache holds the only copy of 1 block, as the layer below gives errors (No space left on device)"
        in line.event
    )
