"""Looks at xenstore, on the simulated one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor.driver_domain import make_driver_domain
from xenbackend.disks import parse_disk
from xenbackend.doctor import store
from xenbackend.doctor.finding import Verdict
from xenbackend.doctor.place import Place
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.xenstore.store import Store

BACKEND = "/local/domain/0/backend"


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A xenstore with a disk of ours, one of blkback's, and one whose keys are odd."""
    with Xenstored(tmp_path / "store") as started, Store(started.address) as nodes:
        for kind, guest, device, script, params in (
            ("vbd", 5, 51712, "/etc/xen/scripts/block-xenbackend", "log:|aio:/img"),
            ("vbd", 5, 51728, "/etc/xen/scripts/block", "/dev/vg/a"),
            ("vbd3", 6, 51712, "block-xenbackend", "aio:what|"),
        ):
            place = f"{BACKEND}/{kind}/{guest}/{device}"
            keys = {
                "frontend": f"/local/domain/{guest}/device/vbd/{device}", "script": script, "params": params,
                "mode": "w", "state": "2", "hotplug-status": "connected",
            }  # fmt: skip
            for key, value in keys.items():
                nodes.write(f"{place}/{key}", value)
            nodes.write(f"/local/domain/{guest}/device/vbd/{device}/state", "1")
            nodes.write(f"/local/domain/{guest}/name", f"guest-{guest}")
        nodes.write(f"{BACKEND}/vbd/odd/51712/state", "1")
        yield started


def test_what_stands_there_of_our_disks(xenstored: Xenstored) -> None:
    """For our disks chain, script and both states are returned; disks of others only on request."""
    found = store.look(xenstored.address, Settings(), None)

    assert [Verdict.OK] == [each.verdict for each in found.findings]
    first, odd = found.data
    assert ("5/xvda", "guest-5", "log:|aio:/img", False, "", 2, 1, "connected") == tuple(
        first[key] for key in ("vbd", "guest", "chain", "read_only", "mistake", "ours_state", "theirs_state", "hotplug")
    )
    assert "vbd3/6/51712" == odd["node"]
    assert odd["mistake"]
    assert "" == odd["chain"]


@pytest.mark.parametrize(("name", "found"), [("5/xvdb", ["5/xvdb"]), ("guest-6/xvda", ["6/xvda"]), ("7/xvda", [])])
def test_the_disk_that_is_wanted_whoever_serves_it(xenstored: Xenstored, name: str, found: list[str]) -> None:
    """A disk is found by number or by its guest's name, whoever serves it."""
    seen = store.look(xenstored.address, Settings(), parse_disk(name)).data

    assert found == [each["vbd"] for each in seen]
    assert all(each["ours"] == (each["vbd"] != "5/xvdb") for each in seen)


def test_what_a_driver_domain_may_see(xenstored: Xenstored) -> None:
    """A driver domain sees its own disks with both states; guests' names, which only dom0 may read, stay empty."""
    address = make_driver_domain(xenstored)
    found = store.look(address, Settings(), None, Place(is_guest=True))
    [seen] = found.data or [{}]

    assert [(Verdict.OK, True)] == [(each.verdict, "our domain is 7" in each.sentence) for each in found.findings]
    assert ("5/xvda", "", 2, 3) == tuple(seen[key] for key in ("vbd", "guest", "ours_state", "theirs_state"))


def test_one_that_is_not_there_or_says_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A xenstored that is missing or silent is wrong, without waiting for it."""
    monkeypatch.setattr(store, "ANSWER_S", 0.2)
    path = str(tmp_path / "silent")
    [missing] = store.look(path, Settings(), None).findings
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        [hangs] = store.look(path, Settings(), None).findings

    assert (True, True) == (missing.is_wrong, hangs.is_wrong)
    assert "cannot connect: No such file or directory" in missing.sentence
    assert "did not answer in time" in hangs.sentence
    assert "systemctl status xenstored" == hangs.command

    [elsewhere] = store.look(path, Settings(), None, Place(is_guest=True)).findings
    assert "it does not run in this domain, but in dom0 or in one of its own" in elsewhere.sentence
    assert "systemctl status xenstored  # in dom0" == elsewhere.command


def test_one_that_may_not_be_asked_is_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the caller may not ask xenstore, the finding is unknown and not wrong."""

    def connect(_near: socket.socket, _path: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x").touch()
    with socket.socket(socket.AF_UNIX) as near:
        near.bind(str(tmp_path / "store"))
        monkeypatch.setattr(socket.socket, "connect", connect)
        [found] = store.look(str(tmp_path / "store"), Settings(), None).findings

    assert (Verdict.UNKNOWN, "sudo xenbackend doctor") == (found.verdict, found.command)
