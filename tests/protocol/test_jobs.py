"""Tests of `xenbackend.protocol.jobs`; `test_codec` tests encoding and decoding."""

from __future__ import annotations

from xenbackend.block.formats import vmdk_descriptor
from xenbackend.block.opening import MAX_PARENTS
from xenbackend.protocol import codec, jobs, opening


def test_a_job_has_room_for_the_largest_disk() -> None:
    """A job has room for a disk with the largest number of extents and parents."""
    assert vmdk_descriptor.MAX_EXTENTS + MAX_PARENTS + 1 <= jobs.MAX_FILES
    assert jobs.MAX_FILES <= codec.MAX_ITEMS


def test_a_job_of_the_longest_names_fits_into_its_datagram() -> None:
    """A job with two chains of the greatest length, and the kept files of 32 parents, fits into one datagram."""
    kept = [jobs.KeptFile("/" + 4000 * "x", 200 * "y")] * (MAX_PARENTS + 1)
    job = jobs.Job("vbd/5/51712", [4096 * "x"] * 2, read_only=False, kept=kept)

    assert len(opening.encode(job)) < opening.MAX_MESSAGE
    assert job == opening.from_supervisor(opening.encode(job))
