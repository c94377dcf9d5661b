"""Tests of `xenbackend.protocol.opening`; that each message comes back as it was is tested in `test_codec`."""

from __future__ import annotations

from xenbackend.block.formats import vmdk_descriptor
from xenbackend.block.opening import MAX_PARENTS
from xenbackend.protocol import codec, opening


def test_a_job_has_room_for_the_largest_disk() -> None:
    """A disk of as many extents and parents as there may be is not refused for their number."""
    assert vmdk_descriptor.MAX_EXTENTS + MAX_PARENTS + 1 <= opening.MAX_FILES
    assert opening.MAX_FILES <= codec.MAX_ITEMS


def test_a_job_of_the_longest_names_fits_into_its_datagram() -> None:
    """Chains of the greatest length and all kept files of an ordinary chain of 32 parents fit into one datagram."""
    kept = [opening.KeptFile("/" + 4000 * "x", 200 * "y")] * (MAX_PARENTS + 1)
    job = opening.Job("vbd/5/51712", [4096 * "x"] * 2, read_only=False, kept=kept)

    assert len(opening.encode(job)) < opening.MAX_MESSAGE
    assert job == opening.from_supervisor(opening.encode(job))
