"""No order waits for what a layer holds back on purpose: in a worker's process, below a guest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.driven import Driven
from tests.until import until
from xenbackend import counters
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_RSP_OKAY
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Submitted, Wishes

pytestmark = pytest.mark.slow  # each starts a process
QUEUED = 200
CHAIN = "throttle:bps_read=1K|aio:{}"


def queued(driven: Driven, image: Path) -> list[Submitted]:
    """Have so many reads wait for a limit that they would take 800 s."""
    frontend = driven.connect(CHAIN.format(image), Wishes(ring_order=4))
    requests = [frontend.submit(BLKIF_OP_READ, 8 * place, 8) for place in range(QUEUED)]
    frontend.wait(requests[:1])
    driven.worker.expect_counter("in_flight", QUEUED - 10, at_least=True, timeout_s=30)
    until(lambda: figures_of(driven)["waiting"] >= QUEUED - 10)  # the figures are written after the counters
    figures = figures_of(driven)
    assert figures["held"] >= figures["waiting"]
    return requests


def figures_of(driven: Driven) -> dict[str, int]:
    """Return the throttle's latest figures."""
    return counters.figures(driven.worker.journal, [["waiting", "held"]])[0]


@pytest.mark.parametrize("order", ["pause", "set", "set the same", "snapshot", "detach"])
def test_an_order_waits_for_no_limit(driven: Driven, images: list[Path], order: str) -> None:
    """C1: each order ends at once, every request is answered once, and the limit applies again afterwards."""
    requests = queued(driven, images[0])
    began = time.monotonic()
    match order:
        case "pause":
            assert Code.OK == driven.worker.ask(messages.Pause()).code
            assert Code.OK == driven.worker.ask(messages.Resume()).code
        case "set":
            assert Code.OK == driven.worker.ask(messages.Swap(f"throttle:iops=1000|aio:{images[0]}")).code
        case "set the same":
            assert Code.OK == driven.worker.ask(messages.Swap(CHAIN.format(images[0]))).code
        case "snapshot":
            leaf = driven.worker.ask(messages.Branch(f"{images[0]}.leaf", "")).data
            assert Code.OK == driven.worker.ask(messages.Swap(leaf)).code
        case "detach":
            driven.worker.tell(messages.Leave)
            assert not driven.worker.expect_standing(Stage.OPEN).failure
    driven.frontend.wait(requests)
    took = time.monotonic() - began

    assert took < 60  # instead of 800 s, on any host
    assert [BLKIF_RSP_OKAY] * QUEUED == [request.status for request in requests]


def test_an_upgrade_waits_for_no_limit(driven: Driven, images: list[Path]) -> None:
    """C1: a worker that hands over ends at once, requests that waited are answered, and its successor goes on with the
    limit.
    """
    requests = queued(driven, images[0])
    began = time.monotonic()
    driven.worker.close(hands_over=True)
    driven.worker.process.wait(10)
    driven.succeed(CHAIN.format(images[0]), resumes=True)
    driven.frontend.wait(requests)
    took = time.monotonic() - began
    late = driven.frontend.submit(BLKIF_OP_READ, 0, 8)
    driven.worker.expect_counter("in_flight", 1, timeout_s=30)

    assert took < 60
    assert late.status is None  # requests that were passed on still count


def test_a_worker_that_is_killed_leaves_what_it_held_to_its_successor(driven: Driven, images: list[Path]) -> None:
    """Requests that a killed worker held back are repeated by its successor, by the journal, under its own limit; each
    is answered once.
    """
    requests = queued(driven, images[0])
    driven.kill()
    driven.succeed(f"throttle:iops=1000|aio:{images[0]}", resumes=True)
    driven.frontend.wait(requests)

    assert [BLKIF_RSP_OKAY] * QUEUED == [request.status for request in requests]
