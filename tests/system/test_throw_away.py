"""Disks of `cow:` without a file, with a real service, workers and guests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.opener.steps import give_name
from xenbackend.protocol.client import ServiceError
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.xenstore.paths import VbdPath

pytestmark = pytest.mark.slow
SIZE = 1 << 20
BASE = b"B" * SIZE
OURS = b"w" * 4096


class Disk:
    """A disk to throw away, and the guest that uses it."""

    def __init__(self, machine: Machine, path: VbdPath, frontend: Frontend) -> None:
        self.machine, self.path, self.frontend = machine, path, frontend
        self.name = path.disk

    def status(self) -> dict[str, Any]:
        """Return what the service says of it."""
        [found] = self.machine.ask({"verb": "status", "vbd": self.name})["data"]
        return found

    def order(self, verb: str, **words: object) -> dict[str, Any]:
        """Give an order, and return its answer, even if it was refused."""
        try:
            return self.machine.ask({"verb": verb, "vbd": self.name, **words})
        except ServiceError as problem:
            return {"code": problem.answer.code.value, "sentence": problem.answer.sentence}

    def kill(self) -> None:
        """Kill its worker, and wait for the next one."""
        worker = self.status()["worker"]
        os.kill(worker, signal.SIGKILL)
        until(lambda: self.status()["worker"] not in (worker, None) and self.status()["phase"] == "serving")

    def has_written(self) -> bool:
        """Return whether the guest reads what it wrote, with the image around it."""
        return [OURS, BASE[:4096]] == [self.frontend.read(64, 8), self.frontend.read(0, 8)]


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Return the directory for unnamed files."""
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def machine(tmp_path: Path, scratch: Path) -> Iterator[Machine]:
    """Return a machine whose settings name that directory."""
    config = tmp_path / "settings.toml"
    config.write_text(f'scratch = "{scratch}"\n')
    (tmp_path / "base").write_bytes(BASE)
    with Machine(log=tmp_path / "log", config=config) as machine:
        yield machine


@contextmanager
def serving(machine: Machine, tmp_path: Path, layer: str = "cow:block=8K") -> Iterator[Disk]:
    """Attach the disk to a guest that has written to it."""
    with closing(machine.create_guest(5)) as guest:
        path = machine.attach(guest.domid, "xvda", f"{layer}|aio:{tmp_path}/base")
        disk = Disk(machine, path, guest.connect(path, Wishes()))
        disk.frontend.write(64, OURS)
        try:
            yield disk
        finally:
            disk.frontend.crash()


@contextmanager
def without_worker(disk: Disk, base: Path) -> Iterator[None]:
    """Keep the chain from being opened while the block lasts: the layer below looks as if it had been changed."""
    before = base.stat()
    os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    os.kill(disk.status()["worker"], signal.SIGKILL)
    until(lambda: "has been replaced or changed" in disk.status()["error"], disk.status)
    yield
    os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_alone(disk: Disk, chain: str) -> dict[str, Any]:
    """Put a chain in between two workers' attempts to open the former one, and return the answer."""
    answers: list[dict[str, Any]] = []

    def is_alone() -> bool:
        answers.append(disk.order("set", chain=chain, replace=True))
        return "is not in service" not in answers[-1].get("sentence", "")

    until(is_alone)
    return answers[-1]


def room(scratch: Path) -> int:
    """Return the bytes of the unnamed files in a directory that processes have open."""
    found = {}
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(fd.readlink()).startswith(f"{scratch}/"):
                found[fd.stat().st_ino] = fd.stat().st_size
        except OSError:
            continue
    return sum(found.values())


def test_it_is_kept_until_it_is_detached(machine: Machine, tmp_path: Path, scratch: Path) -> None:
    """D2: no kill of the worker, the service or both, and no upgrade, loses data; after the detach nothing is left."""
    with serving(machine, tmp_path) as disk:
        disk.kill()
        assert disk.has_written()
        machine.replace_service()
        until(lambda: disk.order("upgrade")["code"] == "ok")
        assert disk.has_written()
        service, worker = machine.service_pid, disk.status()["worker"]
        for pid in (service, worker):
            os.kill(pid, signal.SIGKILL)
        assert disk.has_written()
        assert [] == list(scratch.iterdir())
        assert room(scratch) > 0
        assert BASE == (tmp_path / "base").read_bytes()
        machine.store.remove(disk.path.frontend)
        machine.store.remove(disk.path.backend)
        until(lambda: not machine.ask({"verb": "status"})["data"])

        until(lambda: room(scratch) == 0)


def test_a_size_that_is_looked_up_does_not_lose_it(machine: Machine, tmp_path: Path) -> None:
    """After `resize`, which opens the chain again, the next worker still has the unnamed file."""
    with serving(machine, tmp_path) as disk:
        assert "ok" == disk.order("resize")["code"]
        disk.kill()

        assert disk.has_written()


def test_a_stop_does_not_lose_it_by_mistake(machine: Machine, tmp_path: Path) -> None:
    """`stop` is refused and names the disk; after `stop --force` the disk waits for good, even after `resume`."""
    with serving(machine, tmp_path) as disk:
        with pytest.raises(ServiceError, match=r"the guests of 5/xvda .* --force"):
            machine.ask({"verb": "stop"})
        assert disk.has_written()
        assert 0 == main(["stop", "--force", "--socket", machine.control])
        machine.stop_service()
        machine.start_service()
        until(lambda: disk.status()["reason"] == "other-file")
        assert "was in an unnamed file, and was lost when the service" in disk.status()["error"]
        assert "ok" == disk.order("resume")["code"]
        until(lambda: (disk.status()["reason"], disk.status()["worker"]) == ("other-file", None))
        assert "Connected" == disk.status()["state"]


def test_what_was_written_gets_a_name(machine: Machine, tmp_path: Path, scratch: Path) -> None:
    """`cow keep` gives the data a name while the guest goes on, also after kills; no existing file is overwritten."""
    kept = scratch / "kept.cow"
    with serving(machine, tmp_path) as disk:
        (scratch / "taken").write_bytes(b"precious")
        assert "exists already" in disk.order("keep", file=f"{scratch}/taken")["sentence"]
        assert b"precious" == (scratch / "taken").read_bytes()
        assert "another file system" in disk.order("keep", file="/dev/shm/kept")["sentence"]
        assert disk.has_written()
        assert 0 == main(["cow", "keep", disk.name, str(kept), "--socket", machine.control])
        assert f"cow:{kept}|aio:{tmp_path}/base" == disk.status()["chain"]
        disk.frontend.write(128, OURS)
        disk.kill()
        assert disk.has_written()
        assert "has no unnamed file" in disk.order("keep", file=f"{scratch}/again")["sentence"]
        assert 0 == main(["stop", "--socket", machine.control])
        machine.stop_service()
    machine.start_service()
    with closing(machine.create_guest(6)) as guest:
        path = machine.attach(guest.domid, "xvda", f"cow:{kept}|aio:{tmp_path}/base")
        frontend = guest.connect(path, Wishes())
        assert [OURS, OURS] == [frontend.read(64, 8), frontend.read(128, 8)]
        frontend.crash()


def test_a_name_that_was_given_by_half_is_given(machine: Machine, tmp_path: Path, scratch: Path) -> None:
    """If the file has its name but the order did not end, the disk goes on, and the same order succeeds again."""
    kept = scratch / "kept.cow"
    with serving(machine, tmp_path) as disk:
        held = (fd for fd in Path(f"/proc/{machine.service_pid}/fd").iterdir())
        unnamed = next(fd for fd in held if str(fd.readlink()).startswith(f"{scratch}/"))
        fd = os.open(unnamed, os.O_PATH)
        give_name(fd, str(kept))
        os.close(fd)
        disk.kill()
        assert disk.has_written()
        assert f"cow:block=8K|aio:{tmp_path}/base" == disk.status()["chain"]
        assert "ok" == disk.order("keep", file=str(kept))["code"]
        assert f"cow:{kept}|aio:{tmp_path}/base" == disk.status()["chain"]
        disk.kill()
        assert disk.has_written()


def test_what_was_written_can_be_dropped(machine: Machine, tmp_path: Path) -> None:
    """`cow drop` on a disk in use needs --force; afterwards the guest reads the image again."""
    with serving(machine, tmp_path) as disk:
        assert "a guest uses the disk" in disk.order("drop")["sentence"]
        assert disk.has_written()
        assert 0 == main(["cow", "drop", disk.name, "--force", "--socket", machine.control])
        assert BASE[:4096] == disk.frontend.read(64, 8)
        disk.frontend.write(0, OURS)
        disk.kill()
        assert [OURS, BASE[:4096]] == [disk.frontend.read(0, 8), disk.frontend.read(64, 8)]


@pytest.mark.parametrize("file", ["", "named.cow,"], ids=["unnamed", "named"])
def test_another_chain_without_a_worker_keeps_what_was_written(machine: Machine, tmp_path: Path, file: str) -> None:
    """D2: `set --replace` while there is no worker keeps the unnamed file, and for either file what the guest wrote
    since the last flush, for a new chain with the same layer.
    """
    layer = f"cow:{tmp_path}/{file}block=8K" if file else "cow:block=8K"
    with serving(machine, tmp_path, layer) as disk:
        chain = f"delay:read=0ms|{layer}|aio:{tmp_path}/base"
        with without_worker(disk, tmp_path / "base"):
            set_alone(disk, chain)
            assert chain == disk.status()["chain"]
        disk.order("resume")
        until(lambda: disk.status()["phase"] == "serving", disk.status)

        assert disk.has_written()


def test_a_chain_without_a_place_for_it_is_refused(machine: Machine, tmp_path: Path) -> None:
    """D2: while there is no worker, `set --replace` refuses a chain without an unnamed file, and changes nothing."""
    with serving(machine, tmp_path) as disk:
        with without_worker(disk, tmp_path / "base"):
            for chain in (f"aio:{tmp_path}/base", f"cow:{tmp_path}/other|aio:{tmp_path}/base"):
                answer = set_alone(disk, chain)
                assert "invalid" == answer["code"], answer
                assert "unnamed file, and would be lost" in answer["sentence"]
            assert f"cow:block=8K|aio:{tmp_path}/base" == disk.status()["chain"]
        disk.order("resume")
        until(lambda: disk.status()["phase"] == "serving", disk.status)

        assert disk.has_written()
