"""Each cause is reported once; tests/system/test_doctor.py breaks a whole host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK
from xenbackend.disks import parse_disk
from xenbackend.doctor import examine
from xenbackend.doctor.examine import Wanted, _of_disks, _of_service, _of_store
from xenbackend.doctor.finding import Finding, Verdict, ok, unknown, wrong
from xenbackend.doctor.probes import Result
from xenbackend.supervisor.service.settings import Settings

SERVICE = {"service": {"store": "/store", "store_error": "", "host": "x"}, "disks": []}


def test_where_only_root_may_ask_xenstore_the_services_word_counts() -> None:
    """If only root may read xenstore, the service's word about it counts; a finding of our own counts more."""
    dark = Result([unknown("xenstored", "only root may ask it")])
    lost = {"service": {**SERVICE["service"], "store_error": "end of file"}}
    seen = Result([wrong("xenstored", "no answer", "x")])

    assert Verdict.OK is _of_store(dark, SERVICE).verdict
    assert "the service has lost its connection: end of file" == _of_store(dark, lost).sentence
    assert Verdict.UNKNOWN is _of_store(dark, None).verdict
    assert "no answer" == _of_store(seen, SERVICE).sentence


def test_a_service_that_waits_for_xenstore_is_not_what_is_wrong() -> None:
    """If both service and xenstore are silent, xenstore is the cause; but a stopped service is a fault of its own."""
    hangs = wrong("service", "its process, 7, runs but does not answer: …", "x")
    stopped = wrong("service", "its process, 7, has been stopped", "kill -CONT 7")
    silent = [wrong("xenstored", "no answer", "y")]

    assert Verdict.UNKNOWN is _of_service(hangs, silent).verdict
    assert hangs == _of_service(hangs, [ok("xenstored", "there")])
    assert stopped == _of_service(stopped, silent)


def of(disks: list[dict[str, Any]] | None, seen: list[dict[str, Any]] | None, name: str = "") -> list[Finding]:
    """Return the findings about disks."""
    return _of_disks(Wanted("x", disk=parse_disk(name) if name else None), disks, seen, Settings())


def test_what_is_below_a_disk_takes_the_place_of_what_the_service_says(tmp_path: Path) -> None:
    """A fault in the storage replaces the reason that it explains; if there is none, the reason stays."""
    image = tmp_path / "img"
    known = {**DISK, "chain": f"aio:{image}", "reason": "cannot-open", "error": "it cannot be opened"}
    [missing] = [each for each in of([known], None) if each.is_wrong]
    image.touch()
    found = of([known], None)

    assert ("file", f"there is no file or device {image}") == (missing.check, missing.sentence)
    assert [("reason", Verdict.WRONG), ("file", Verdict.OK)] == [(each.check, each.verdict) for each in found]


def test_storage_of_a_disk_that_is_served_is_left_alone(tmp_path: Path) -> None:
    """The files of a disk without a reason are not examined."""
    [found] = of([{**DISK, "worker": 0, "chain": f"aio:{tmp_path}/none"}], None)

    assert ("handshake", Verdict.OK) == (found.check, found.verdict)


def test_of_very_many_disks_only_some_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many disks only some are examined; the others are reported as unknown."""
    monkeypatch.setattr(examine, "MOST_DISKS", 1)
    known = {**DISK, "chain": "ram:1M", "reason": "trouble", "error": "so"}
    *_, last = of([known, known, known], None)

    assert (Verdict.UNKNOWN, True) == (last.verdict, "of 2 more disks were not examined" in last.sentence)


def test_a_disk_that_nobody_knows() -> None:
    """An unknown disk is wrong if service or xenstore could be asked, and unknown otherwise."""
    assert of([DISK], [], "7/xvda")[0].is_wrong
    assert [Verdict.UNKNOWN] == [each.verdict for each in of(None, None, "7/xvda")]
    assert [] == of([], [])
