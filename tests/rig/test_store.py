"""The rig's xenstored on sockets, with Xen's own tools where they are installed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.errors import StoreError
from xenbackend.rig import store as module
from xenbackend.rig.session import HEADER
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.store import Store

TEST_XENSTORE = next(iter(sorted(Path("/usr/lib").glob("xen-*/bin/test-xenstore"))), None)
needs_tools = pytest.mark.skipif(shutil.which("xenstore-ls") is None, reason="package xenstore-utils is not installed")


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A running xenstored with domain 5."""
    with Xenstored(tmp_path / "store") as running:
        running.add_domain_socket(5)
        yield running


def tool(address: str, *command: str) -> str:
    """Run one of Xen's tools against a xenstored and return what it prints."""
    return subprocess.run(
        command, env={**os.environ, "XENSTORED_PATH": address}, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@needs_tools
def test_xens_own_tools_work(xenstored: Xenstored) -> None:
    """xenstore-write, -read, -ls, -chmod, -rm of Xen speak to the rig as to a real xenstored."""
    tool(xenstored.address, "xenstore-write", "/a/b", "hello", "/a/c", "x y")
    tool(xenstored.address, "xenstore-chmod", "/a/b", "n0", "r5")

    assert tool(xenstored.address, "xenstore-read", "/a/b", "domid") == "hello\n0\n"
    assert tool(f"{xenstored.address}.5", "xenstore-read", "-s", "/a/b", "domid") == "hello\n5\n"
    assert tool(xenstored.address, "xenstore-ls", "-s", "/a") == 'b = "hello"\nc = "x y"\n'
    tool(xenstored.address, "xenstore-rm", "/a")
    assert tool(xenstored.address, "xenstore-list", "/") == "local\n"


@pytest.mark.skipif(TEST_XENSTORE is None, reason="package xen-utils is not installed: no test-xenstore")
def test_xens_own_test_passes(xenstored: Xenstored) -> None:
    """Xen's test-xenstore (reads, writes, removals, conflicting transactions) passes against the rig."""
    printed = tool(xenstored.address, str(TEST_XENSTORE))

    assert "ta err" in printed


def test_what_a_toolstack_sets_up_is_seen_by_both_ends(xenstored: Xenstored) -> None:
    """Domain 0 makes a vbd's directories; guest and backend each write their own directory and read the other's."""
    with Store(xenstored.address) as backend, Store(f"{xenstored.address}.5") as guest:
        frontend_path, backend_path = "/local/domain/5/device/vbd/51712", "/local/domain/0/backend/vbd/5/51712"
        backend.write(f"{frontend_path}/backend", backend_path)
        backend.set_permissions(frontend_path, ["n5", "r0"])
        backend.write(backend_path, "")
        backend.set_permissions(backend_path, ["n0", "r5"])
        backend.write(f"{backend_path}/state", "2")

        guest.write("device/vbd/51712/state", "3")
        assert guest.read(f"{backend_path}/state") == "2"
        assert backend.read(f"{frontend_path}/state") == "3"
        with pytest.raises(StoreError, match="Permission denied"):
            guest.write(f"{backend_path}/state", "4")


def test_dump_and_observer_show_every_change(tmp_path: Path) -> None:
    """The observer is called for each change in order, None for a removal; `dump` lists parents first."""
    seen: list[tuple[str, bytes | None]] = []
    with Xenstored(tmp_path / "s", observer=lambda path, value: seen.append((path, value))) as xenstored:
        with Store(xenstored.address) as store:
            seen.clear()
            store.write("/a/b", "1")
            store.write("/a/b", "2")
            assert xenstored.dump("/a") == [("/a", ""), ("/a/b", "2")]
            store.remove("/a")
        assert xenstored.dump("/a") == []
    assert seen == [("/a/b", b"1"), ("/a/b", b"2"), ("/a", None)]


@pytest.mark.parametrize("forget", [False, True])
def test_a_restart_keeps_or_forgets_the_nodes(xenstored: Xenstored, *, forget: bool) -> None:
    """Stopping closes all connections; after a restart the nodes are kept, or only the initial ones are there."""
    with Store(xenstored.address) as store:
        store.write("/a", "1")
        xenstored.stop(forget=forget)
        with pytest.raises(StoreError):
            store.read("/a")
        xenstored.start()
        store.reconnect()

        assert store.read_optional("/a") == (None if forget else "1")
        assert store.own_domid() == 0


def test_stopping_leaves_nothing_behind(tmp_path: Path) -> None:
    """After `stop` there is no socket file; stopping twice is allowed, and so is asking a stopped xenstored."""
    xenstored = Xenstored(tmp_path / "store")
    assert xenstored.add_domain_socket(5) == f"{tmp_path}/store.5"
    xenstored.start()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store", "store.5"]
    xenstored.stop()
    xenstored.stop()

    assert list(tmp_path.iterdir()) == []
    assert ("/local/domain/5/domid", "5") in xenstored.dump()


def test_a_dead_domain_is_hung_up_on(xenstored: Xenstored) -> None:
    """Releasing a domain closes its connections and socket; its nodes stay for the toolstack, others get an event."""
    with Store(xenstored.address) as host, Store(f"{xenstored.address}.5") as guest:
        host.watch("@releaseDomain", "gone")
        host.read("domid")
        host.events()
        xenstored.release_domain(5)

        with pytest.raises(StoreError):
            guest.read("domid")
        with pytest.raises(StoreError, match="cannot connect"):
            guest.reconnect()
        assert host.read("/local/domain/5/domid") == "5"
        assert host.events() == [("@releaseDomain", "gone")]


def test_who_does_not_read_is_hung_up_on(xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never reads replies costs bounded memory, and others are served meanwhile."""
    monkeypatch.setattr(module, "_UNREAD_MAX", 100_000)
    with Store(xenstored.address) as store, socket.socket(socket.AF_UNIX) as deaf:
        store.write("/a", "x" * 2000)
        deaf.connect(xenstored.address)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_for_ever(deaf, HEADER.pack(2, 0, 0, 3) + b"/a\0")

        assert store.read("/a") == "x" * 2000


def ask_for_ever(deaf: socket.socket, request: bytes) -> None:
    """Send a request again and again without reading a reply."""
    while True:
        deaf.sendall(request)


def test_who_breaks_the_frame_is_hung_up_on(xenstored: Xenstored) -> None:
    """A client that sends a broken frame is closed."""
    with socket.socket(socket.AF_UNIX) as broken:
        broken.connect(xenstored.address)
        broken.sendall(b"\xff" * 16)

        assert broken.recv(1) == b""


def test_it_runs_by_itself(tmp_path: Path) -> None:
    """The module is a program: it serves until SIGTERM, ends with status 0 and removes its sockets."""
    address = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-m", "xenbackend.rig.store", str(address), "5"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving {address}\n"
        with Store(f"{address}.5") as guest:
            assert guest.own_domid() == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    assert list(tmp_path.iterdir()) == []
