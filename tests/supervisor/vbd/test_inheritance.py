"""The names of a vbd's descriptors in the keeper."""

from __future__ import annotations

import os

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept
from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.inheritance import check_versions, sort_inherited
from xenbackend.supervisor.xenstore.paths import VbdPath


def test_names_tell_whose_they_are(kept: Kept) -> None:
    """Inherited descriptors are sorted by vbd, in whatever order they come. A name without a version is the last
    release's. Descriptors with other names are closed and forgotten.
    """
    other = VbdPath("vbd3", 0, 7, 768)
    keeper = kept.keeper()
    for name in (
        "vbd-0-5-51712.journal",
        "vbd3-0-7-768.m0.3",
        "vbd-0-5-51712.worker.17",
        "x",
        "vbd-1-5-51712.m0",
        "a-b-c-d.e",
        "vbd-0-5-51712",
    ):
        keeper.keep(name, 0)
    assert 7 == len(kept.fds)
    before = len(open_descriptors())
    keeper = kept.keeper()
    found = sort_inherited(keeper, 0)

    assert {PATH: {("journal", 2), ("worker", 17)}, other: {("m0", 3)}} == {
        path: set(fds) for path, fds in found.items()
    }
    assert 3 == len(kept.fds)
    assert 3 - 4 == len(open_descriptors()) - before  # of the seven copies three stay; of the keeper's own, four go
    for fds in found.values():
        for fd in fds.values():
            os.close(fd)


@pytest.mark.parametrize("kind", ["journal", "notes", "worker", "pidfd", "m0", "something"])
def test_a_newer_version_s_disks_are_left_alone(kind: str) -> None:
    """A service that finds descriptors of a newer version refuses to start, and names the disk."""
    known = [
        f"vbd-0-5-51712.{each}"
        for each in ("journal", "journal.3", "notes.3", "worker.3", "pidfd", "m7.3", "odd.thing")
    ]
    check_versions([*known, "settings", "control", "orders.9", "vbd-x-5-51712.journal.9"])
    with pytest.raises(ConfigError, match=f"vbd/5/51712 is served by a newer version of xenbackend, whose {kind} "):
        check_versions([*known, f"vbd-0-5-51712.{kind}.9"])
