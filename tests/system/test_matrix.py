"""Every way in which a frontend may connect, with verified data, on one real worker that is reconnected each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.driven import Driven
from tests.workload import DIRECT, make_model, read_all, work
from xenbackend.blkif.abi import X86_32, X86_64, Layout
from xenbackend.rig.frontend import Wishes

SECTORS = 16384
REQUESTS = 300


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    """A worker with a disk of 8 MiB."""
    with Driven(tmp_path_factory.mktemp("rig")) as driven:
        driven.connect(f"ram:{SECTORS * 512}")
        yield driven
        driven.worker.end()
        assert [] == driven.worker.lines


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 4])
@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("persistent", [False, True], ids=["copy", "persistent"])
@pytest.mark.parametrize("indirect", [0, 256], ids=["direct", "indirect"])
@pytest.mark.parametrize("layout", [X86_64, X86_32], ids=lambda layout: layout.protocol)
def test_data_is_right(
    driven: Driven,
    layout: Layout,
    indirect: int,
    persistent: bool,
    queues: int,
    order: int,
) -> None:
    """With every layout, ring, number of rings, kind of grants and of requests, the disk holds the right data."""
    start = 2**32 - 5 if queues == 1 else 0
    wishes = Wishes(
        layout=layout, ring_order=order, queues=queues, persistent=persistent, indirect=indirect, start_index=start
    )
    frontend = driven.reconnect(wishes)
    model = make_model(seed=1, sectors=SECTORS, max_count=512 if indirect else DIRECT)
    frontend.discard(0, SECTORS)
    work(frontend, model, REQUESTS)
    read_all(frontend, model)

    assert 0 == model.failures
    assert (indirect, persistent) == (frontend.facts.max_indirect, frontend.facts.persistent)


@pytest.mark.slow
def test_any_numbers_of_queues_and_orders(driven: Driven) -> None:
    """Each number of rings and each ring size is served."""
    for queues, order in [(2, 1), (3, 2), (8, 3), (8, 0)]:
        frontend = driven.reconnect(Wishes(queues=queues, ring_order=order, start_index=2**32 - 5))
        frontend.discard(0, SECTORS)
        model = make_model(seed=queues, sectors=SECTORS)
        work(frontend, model, REQUESTS)

        assert 0 == model.failures
