"""The driver rbd without a cluster: what it refuses before it connects. tests/engines runs it on a real Ceph."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers_block import Machine
from xenbackend.block.chain import parse_chain
from xenbackend.block.drivers import LOADED_AHEAD, words_of
from xenbackend.block.drivers import rbd as driver
from xenbackend.block.drivers.rbd import Rbd
from xenbackend.block.servers import Account
from xenbackend.errors import ChainError, DriverError


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.mark.parametrize(
    ("text", "account"),
    [
        ("rbd:rbd/a", Account("/etc/ceph/ceph.conf", "admin")),
        ("rbd:rbd/a,id=xen,conf=/etc/ceph/b.conf", Account("/etc/ceph/b.conf", "xen")),
        ("rbd:a\\,b/c\\|d,id=x.y-z", Account("/etc/ceph/ceph.conf", "x.y-z")),
    ],
)
def test_what_is_asked_for(text: str, account: Account) -> None:
    """A chain names an image, a user and a configuration file. Names may contain commas and bars."""
    [layer] = parse_chain(text).layers
    assert account == layer.options.account
    assert text == layer.text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rbd:", "image is missing"),
        ("rbd:a", "neither POOL/IMAGE"),
        ("rbd:a/b,id=client.xen", "id=xen"),
        ("rbd:a/b,id=", "not the name of a user"),
        ("rbd:a/b,id=x y", "not the name of a user"),
        ("rbd:a/b,conf=ceph.conf", "not an absolute path"),
        ("rbd:a/b,cache=on", "unknown option 'cache'"),
        ("rbd:a/b|aio:/img", "source and passes nothing on"),
    ],
)
def test_what_cannot_be_is_refused(text: str, match: str) -> None:
    """A chain that cannot name an image is refused before anything is touched."""
    with pytest.raises(ChainError, match=match):
        parse_chain(text)


def test_nobody_shares_it(machine: Machine) -> None:
    """An image has only one writer, so attaching it as shared is refused before the cluster is contacted."""
    with pytest.raises(DriverError, match="has only one writer"):
        machine.open("rbd:a/b,conf=/nonesuch", shareable=True)


def test_a_configuration_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    """If something is wrong with the configuration file, the error names the file."""
    with pytest.raises(DriverError, match=r"no file or device .*/nonesuch"):
        machine.open(f"rbd:a/b,conf={tmp_path}/nonesuch")


def test_a_cluster_that_cannot_be_reached(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If librados fails, the error says why, and the driver keeps nothing of the connection."""

    def refuse(self: object, user: str, settings: Mapping[str, str]) -> None:
        raise DriverError(f"no monitor, as {user} by {settings['key']}")

    monkeypatch.setattr("xenbackend.block.drivers.rbd.Cluster.__init__", refuse)
    monkeypatch.setattr(machine.files, "read_cluster", lambda account: {"key": account.conf})
    with pytest.raises(DriverError, match="no monitor, as admin by /c"):
        machine.open("rbd:a/b,conf=/c")


@pytest.mark.parametrize("is_late", [False, True])
def test_what_was_connected_is_let_go_of_when_opening_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, *, is_late: bool
) -> None:
    """If an image cannot be opened, the connection to its cluster is closed, even if opening has already timed out."""
    goes_on, closed = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        goes_on.wait(10)
        raise OSError(errno.EMFILE, "too many open files")

    if is_late:
        monkeypatch.setattr(driver, "OPEN_S", 0.01)
    else:
        goes_on.set()
    monkeypatch.setattr(driver, "Cluster", lambda *_: SimpleNamespace(close=closed.set))
    monkeypatch.setattr(driver, "Pool", fail)
    monkeypatch.setattr(machine.files, "read_cluster", lambda _account: {})
    with pytest.raises(DriverError, match="has not answered" if is_late else "too many open files"):
        machine.open("rbd:a/b,conf=/c")
    assert closed.is_set() != is_late
    goes_on.set()
    assert closed.wait(10)


def test_a_worker_is_told_of_it_before_its_walls() -> None:
    """A worker is told the words of its chain before its walls go up, so that it loads rbd, and what that needs."""
    assert ["log", "rbd", "throttle"] == words_of("log:|throttle:iops=5|rbd:a/b")
    assert "rbd" in LOADED_AHEAD
    assert frozenset({"ceph", "network"}) == Rbd.needs


def test_no_process_has_it_that_does_not_need_it() -> None:
    """Importing the driver, as the zygote does, does not load librbd."""
    program = "import xenbackend.block.drivers.rbd; print('librbd' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "False" == done.stdout.strip()
