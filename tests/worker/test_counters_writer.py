"""The counters of one connection, added to those that are on the page already."""

from __future__ import annotations

import errno

from tests.served import Served
from xenbackend import counters
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE_BARRIER
from xenbackend.block.request import Op
from xenbackend.kernel.cpu import CpuTimes
from xenbackend.rig.frontend import Wishes
from xenbackend.worker.polling import Permit, Poller


def numbers(vbd: Served, *names: str) -> list[int]:
    """Return counters as a reader in another process sees them."""
    found = counters.snapshot(vbd.journal)
    return [found[name] for name in names]


def test_each_operation_is_counted_by_its_kind(vbd: Served) -> None:
    """Reads, writes, flushes and discards that were answered without an error are counted, with their bytes."""
    frontend = vbd.connect(Wishes(indirect=32))
    frontend.write(0, bytes(512 * 3))
    frontend.wait([frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=bytes(4096))])
    frontend.read(0, 8 * 20)
    frontend.flush()
    frontend.discard(0, 8)
    vbd.pass_time(2)

    assert [1, 2, 1, 1] == numbers(vbd, "reads", "writes", "flushes", "discards")
    assert [4096 * 20, 4096 + 512 * 3] == numbers(vbd, "read_bytes", "written_bytes")
    assert [0, 0, 0] == numbers(vbd, "errors", "guest_errors", "in_flight")


def test_errors_are_told_apart_by_whose_they_are(vbd: Served) -> None:
    """A request that breaks a rule counts as the guest's error, one that the disk fails as the disk's."""
    vbd.policy = "read=report"
    frontend = vbd.connect()
    frontend.wait([frontend.submit(BLKIF_OP_READ, 2**40, 8) for _ in range(2)])
    vbd.disk.errors = {Op.READ: errno.EIO}
    frontend.wait([frontend.submit(BLKIF_OP_READ, 0, 8)])
    vbd.disk.errors = {}
    bad = frontend.submit(BLKIF_OP_READ, 0, 8, push=False)
    vbd.guest.fail(bad.pages[0].gref, -3)
    frontend.wait([bad])
    vbd.pass_time(2)

    assert [1, 3, 0] == numbers(vbd, "errors", "guest_errors", "reads")


def test_counters_go_on_where_the_last_connection_ended(vbd: Served) -> None:
    """A connection adds to the counters on the page, so that they outlive connections and workers."""
    for expected in (1, 2, 3):
        frontend = vbd.connect()
        frontend.read(0, 8)
        vbd.disconnect()
        for ring in frontend.rings:
            ring.close()

        assert [expected, 0] == numbers(vbd, "reads", "in_flight")


def test_what_is_in_flight_is_shown(vbd: Served) -> None:
    """`in_flight` is the number of requests that are taken and not answered yet."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    requests = [frontend.submit(BLKIF_OP_READ, 0, 8) for _ in range(5)]
    vbd.step()
    vbd.pass_time(2)
    shown = numbers(vbd, "in_flight")
    vbd.disk.give_back()
    frontend.wait(requests)
    vbd.pass_time(2)

    assert [[5], [0]] == [shown, numbers(vbd, "in_flight")]


def test_latency_has_a_histogram(vbd: Served) -> None:
    """Each sample is in one bucket of the histogram, and in the sum."""
    frontend = vbd.connect()
    for _ in range(128):
        frontend.read(0, 8)
    vbd.pass_time(2)
    samples, total, most = numbers(vbd, "latency_samples", "latency_ns", "latency_max_ns")
    page = vbd.journal[: counters.SIZE].cast("Q")

    assert 0 < samples == sum(page[counters.HISTOGRAM : counters.HISTOGRAM + counters.BUCKETS])
    assert 0 < most <= total
    assert counters.percentile_ns(counters.histogram(vbd.journal), 1.0) > most


def test_each_operation_has_a_histogram_of_its_own(vbd: Served) -> None:
    """The histograms of the operations add up to the one of all requests, in sum and buckets; earlier counts stay."""
    frontend = vbd.connect()
    for _ in range(128):
        frontend.read(0, 8)
        frontend.write(0, bytes(4096))
    frontend.flush()
    vbd.pass_time(2)
    timed = counters.by_operation(vbd.journal)
    [total] = numbers(vbd, "latency_ns")

    assert list(counters.OPERATIONS) == list(timed)
    assert min(sum(timed["read"]["buckets"]), sum(timed["write"]["buckets"])) > 0 == sum(timed["discard"]["buckets"])
    assert total == sum(each["sum_ns"] for each in timed.values())
    assert counters.histogram(vbd.journal) == [
        sum(each) for each in zip(*(each["buckets"] for each in timed.values()), strict=True)
    ]


def test_rests_are_published(vbd: Served) -> None:
    """The counters tell whether polling rests now, and for how long it has rested, so that a slow guest can be
    explained.
    """
    now = 0
    permit = Permit(lambda: CpuTimes(now, now, 0, now), lambda: now)
    vbd.connect()
    vbd.connection.engine.poller = Poller(60_000, permit, lambda: now)
    for now in (0, 50_000_000):  # half of the time it has waited
        permit.allows(now)
    now += 400_000_000
    vbd.connection.publish_counters()

    assert [1, 400_000_000, 0] == numbers(vbd, "rests", "rested_ns", "look_ns")

    now += 10**9
    vbd.connection.publish_counters()

    assert [1, 10**9, 60_000] == numbers(vbd, "rests", "rested_ns", "look_ns")


def test_what_layers_count_is_published(vbd: Served) -> None:
    """Figures of the layers are written with the counters; a figure that does not fit into a word is clamped."""
    vbd.connect()
    assert vbd.connection is not None
    vbd.connection.count_layers(lambda: [3, -1, 1 << 70, *range(10_000)])

    [found] = counters.figures(vbd.journal, [["a", "b", "c"]])
    assert {"a": 3, "b": 0, "c": (1 << 64) - 1} == found


def test_a_page_that_is_full_is_no_bug(vbd: Served) -> None:
    """Whatever a hostile predecessor has left on the page, its successor counts on without a bug."""
    vbd.journal[: counters.SIZE] = b"\xff" * counters.SIZE
    frontend = vbd.connect()
    for _ in range(128):
        frontend.read(0, 8)
    vbd.pass_time(2)

    assert [127, 0] == numbers(vbd, "reads", "in_flight")
    assert [] == vbd.bugs
