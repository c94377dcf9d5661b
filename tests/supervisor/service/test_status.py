"""Rates between two pictures of a vbd; what a picture holds is tried in `test_registry.py`."""

from __future__ import annotations

from xenbackend.supervisor.service.status import rates

BEFORE = {"worker": 12, "counters": {"reads": 100, "writes": 10, "read_bytes": 4096, "written_bytes": 0}}
AFTER = {"worker": 12, "counters": {"reads": 300, "writes": 10, "read_bytes": 12288, "written_bytes": 0}}


def test_rates_are_per_second() -> None:
    """Each rate is the difference of its counter over the time between the pictures."""
    assert {"reads": 100.0, "writes": 0.0, "read_bytes": 4096.0, "written_bytes": 0.0} == rates(BEFORE, AFTER, 2.0)


def test_another_worker_has_other_counters() -> None:
    """Counters of two processes, or without time between them, give no rate: never a negative or infinite one."""
    zeros = dict.fromkeys(("reads", "writes", "read_bytes", "written_bytes"), 0.0)

    assert [zeros, zeros] == [rates(BEFORE, {**AFTER, "worker": 13}, 2.0), rates(BEFORE, AFTER, 0.0)]
