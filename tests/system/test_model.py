"""A long random mix of all operations against a model of the disk; `--requests` sets its length, `--seed` the mix."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driven import Driven
from tests.workload import make_model, read_all, work
from xenbackend.blkif.abi import X86_32
from xenbackend.rig.frontend import Wishes

SECTORS = 16384
CONNECTIONS = [
    Wishes(queues=4, ring_order=2, indirect=64, start_index=2**32 - 5),
    Wishes(queues=2, persistent=True, indirect=256),
    Wishes(layout=X86_32, queues=1, ring_order=4, start_index=2**31 - 5),
    Wishes(queues=8, persistent=True, start_index=2**32 - 5),
]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ram", "aio"])
def test_disk_is_what_the_model_says(tmp_path: Path, pytestconfig: pytest.Config, source: str) -> None:
    """After any mix of requests, over several connections of different kinds, each sector is as last written."""
    seed = pytestconfig.getoption("--seed")
    requests = pytestconfig.getoption("--requests") // 2
    print(f"--seed {seed}")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SECTORS * 512)
    model = make_model(seed, SECTORS, max_count=128)
    with Driven(tmp_path) as driven:
        driven.connect(f"ram:{SECTORS * 512}" if source == "ram" else f"aio:{image}")
        for wishes in CONNECTIONS:
            model.max_count = 128 if wishes.indirect else 88
            work(driven.reconnect(wishes), model, requests // len(CONNECTIONS))
        read_all(driven.frontend, model)
        driven.worker.end()
        counted = driven.worker.counters()

        assert [] == driven.worker.lines
        assert [0] * 4 == [counted[name] for name in ("errors", "guest_errors", "missed_wakeups", "bugs")]
    assert 0 == model.failures
