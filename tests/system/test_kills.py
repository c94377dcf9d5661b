"""Workers that are killed under load, and their successors: the guest sees nothing but a pause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.driven import Driven
from tests.workload import Load, make_model, read_all
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_OKAY,
    X86_32,
)
from xenbackend.protocol import messages
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
SECTORS = 4096
WISHES = {
    "plain": Wishes(),
    "persistent": Wishes(persistent=True),
    "indirect": Wishes(persistent=True, indirect=64, ring_order=1),
    "queues": Wishes(queues=3, persistent=True),
    "32 bits": Wishes(layout=X86_32, indirect=32),
    "wrapping": Wishes(start_index=2**32 - 40),
    "barriers": Wishes(flush=False, queues=2),
}


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    """A worker on its own rig."""
    with Driven(tmp_path) as driven:
        yield driven


@pytest.mark.parametrize("wishes", WISHES.values(), ids=WISHES)
def test_killed_under_load(driven: Driven, tmp_path: Path, wishes: Wishes, request: pytest.FixtureRequest) -> None:
    """After a worker is killed at any moment its successor answers each request once; no write is lost."""
    seed = request.config.getoption("--seed")
    random = Random(seed)
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SECTORS * 512)
    chain = f"log:|aio:{image}"
    frontend = driven.connect(chain, wishes)
    model = make_model(seed, SECTORS)
    load = Load(frontend, model)
    for _ in range(6):
        load.run(random.randrange(50, 250))
        load.top_up()
        driven.kill()
        driven.succeed(chain, resumes=True)
    load.run(200)
    load.finish()

    assert 0 == model.failures
    read_all(frontend, model)
    driven.disconnect()


def test_a_worker_that_is_killed_while_it_recovers(driven: Driven) -> None:
    """If a successor is killed too, the next one finishes the requests."""
    chain = "delay:write=100ms|ram:1M"
    frontend = driven.connect(chain)
    writes = [frontend.submit(BLKIF_OP_WRITE, 8 * place, data=bytes([place + 1]) * 4096) for place in range(20)]
    driven.kill()
    driven.succeed(chain, resumes=True)
    driven.kill()
    driven.succeed(chain, resumes=True)
    frontend.wait(writes)

    assert [BLKIF_RSP_OKAY] * 20 == [write.status for write in writes]
    assert [bytes([place + 1]) * 4096 for place in range(20)] == [frontend.read(8 * place, 8) for place in range(20)]


def test_a_ring_that_the_guest_broke_meanwhile_is_stopped(driven: Driven) -> None:
    """If a guest moves a response index while no worker runs, the successor stops that ring and does nothing else."""
    frontend = driven.connect("ram:1M")
    frontend.write(0, b"x" * 4096)
    driven.kill()
    frontend.rings[0].ring.index[2] += 7  # rsp_prod
    driven.succeed("ram:1M", resumes=True)

    why = "the frontend moved our response index by 7, of 0 answers"
    assert f"ring 0 was stopped: {why}" == driven.worker.stand().halted
    driven.worker.end()


def test_a_failed_flush_is_not_forgotten(driven: Driven) -> None:
    """After a failed flush a successor keeps holding the requests, and completes the flush only after `resume`."""
    chain = "fault:op=flush,limit=1|ram:1M"
    frontend = driven.connect(chain)
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    driven.worker.expect_standing()
    driven.kill()
    driven.succeed("ram:1M", resumes=True)
    late = frontend.submit(BLKIF_OP_READ, 0, 8)
    standing = driven.worker.stand()

    assert "the disk is paused" in standing.flush_failed
    assert [None, None] == [flush.status, late.status]
    driven.worker.ask(messages.Resume())
    frontend.wait([flush, late])
    assert [BLKIF_RSP_OKAY] * 2 == [flush.status, late.status]


def test_without_an_agreement_there_is_nothing_to_rejoin(driven: Driven) -> None:
    """A worker that is told to rejoin rings although none were agreed on reports a failure."""
    driven.open("ram:1M")
    driven.worker.tell(messages.Serve, None)

    assert "no record of what was agreed" in driven.worker.expect_standing().failure
