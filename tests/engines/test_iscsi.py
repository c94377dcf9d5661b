"""A disk on an iSCSI target through qemu-nbd, which has an initiator of its own, for hosts whose kernel has none."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.guest import SIZE, Guest
from tests.engines.servers import Engine
from tests.until import until
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine

NAME = "iqn.2026-11.example:disk"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a target of tgt with one unit, the file `unit`. All of its files are in the test's directory."""
    for program in ("tgtd", "tgtadm", "qemu-nbd"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")
    monkeypatch.setenv("TGT_IPC_SOCKET", str(tmp_path / "tgtd"))
    unit = tmp_path / "unit"
    unit.write_bytes(bytes(SIZE))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        portal = f"127.0.0.1:{probe.getsockname()[1]}"
    with (tmp_path / "tgtd.log").open("wb") as log:
        process = subprocess.Popen(
            ["tgtd", "-f", "--iscsi", f"portal={portal}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        until(lambda: process.poll() is not None or _tgtadm("--mode", "target", "--op", "show") == 0)
        for words in (
            ("--op", "new", "--mode", "target", "--tid", "1", "-T", NAME),
            ("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", str(unit)),
            ("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"),
        ):
            assert 0 == _tgtadm(*words), (tmp_path / "tgtd.log").read_text()
        yield f"iscsi://{portal}/{NAME}/1"
    finally:
        process.kill()
        process.wait()


def _tgtadm(*words: str) -> int:
    command = ["tgtadm", "--lld", "iscsi", *words]
    return subprocess.run(command, check=False, capture_output=True, timeout=20).returncode


@pytest.fixture
def engine(target: str, tmp_path: Path) -> Iterator[Engine]:
    """An NBD server for the target."""
    done = subprocess.run(["qemu-img", "info", target], check=False, capture_output=True, text=True, timeout=20)
    if "Unknown protocol" in done.stderr:
        pytest.skip("this QEMU has no iSCSI; Debian's package qemu-block-extra brings it")
    assert 0 == done.returncode, done.stderr
    with Engine("qemu-nbd", tmp_path, SIZE, image=target) as engine:
        yield engine


def test_demo(engine: Engine) -> None:
    """The demo runs on such a disk and verifies every sector."""
    assert 0 == main(["demo", "--quiet", "--area", "16M", "--seconds", "1", engine.chain])


def test_workers_and_the_bridge_are_killed(
    machine: Machine, engine: Engine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """If its worker or the NBD server in front of the target dies amid requests, a guest sees a pause and no error."""
    with ExitStack() as stack:
        guest = Guest(machine, engine.chain, request.config.getoption("--seed"), stack)
        guest.outlive(engine)
        guest.load.run(100)
        guest.end()
    assert (tmp_path / "unit").read_bytes() != bytes(SIZE)
