"""`pause`, `resume`, `set`, `resize`, `policy` on a disk in service, while a guest uses it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.blkif.abi import BLKIF_OP_READ
from xenbackend.block.spec import parse_chain
from xenbackend.cli.main import main
from xenbackend.embedded.machine import Machine
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.rig.frontend import Frontend, Wishes

pytestmark = pytest.mark.slow
PAGE = 4096
SIZE = 1 << 20


class Bench:
    """One guest with one disk, and the command line."""

    def __init__(self, machine: Machine, frontend: Frontend, image: Path) -> None:
        self.machine = machine
        self.frontend = frontend
        self.image = image

    def run(self, verb: str, *arguments: str) -> int:
        """Run a command on the disk and return its exit status."""
        return main([verb, "5/xvda", *arguments, "--socket", self.machine.control])

    def known(self) -> dict[str, object]:
        """Return what the service knows of the disk."""
        return dict(self.machine.ask({"verb": "status"})["data"][0])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A disk that every test leaves as it found it."""
    image = tmp_path_factory.mktemp("disk") / "image"
    image.write_bytes(bytes(SIZE))
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes(persistent=True))
        yield Bench(machine, frontend, image)
        frontend.close()


def test_pause_and_resume(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """While a disk is paused no request is answered; after `resume` all are."""
    paused = bench.run("pause")
    read = bench.frontend.submit(BLKIF_OP_READ, 0, 8)
    bench.machine.ask({"verb": "ping"})
    bench.frontend.poll()
    before = read.status
    resumed = bench.run("resume")
    bench.frontend.wait([read])

    assert (0, 0, None, 0) == (paused, resumed, before, read.status)
    assert "5/xvda is paused; to continue: xenbackend resume 5/xvda" in capsys.readouterr().out


def test_set_puts_another_chain_in(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter put into the chain sees the writes from then on; status, xenstore and the guest's data agree."""
    bench.frontend.write(0, b"a" * PAGE)
    status = bench.run("set", f"log:|aio:{bench.image}")
    bench.frontend.write(8, b"b" * PAGE)
    path = str(bench.known()["node"])

    assert 0 == status
    assert [(8, 8)] == bench.machine.written_ranges("5/xvda")
    assert f"log:|aio:{bench.image}" == bench.known()["chain"]
    assert f"log:|aio:{bench.image}" == bench.machine.store.read(f"/local/domain/0/backend/{path}/params")
    assert b"a" * PAGE + b"b" * PAGE == bench.frontend.read(0, 16)
    assert 0 == bench.run("set", f"aio:{bench.image}", "--json")
    assert f"aio:{bench.image}" == json.loads(capsys.readouterr().out.splitlines()[-1])["chain"]


@pytest.mark.parametrize(
    ("chain", "status", "sentence"),
    [
        ("aio:{image}.no", 2, "there is no file or device"),
        ("aio:{image}|log:", 2, "log"),
        ("ram:4K --replace", 2, "cannot shrink while it is in use"),
        ("ram:1M", 2, "--replace"),
        ("aio:image", 2, "image"),
    ],
)
def test_a_chain_that_cannot_be_leaves_the_former_one(
    bench: Bench, capsys: pytest.CaptureFixture[str], chain: str, status: int, sentence: str
) -> None:
    """A chain that cannot be opened, or does not fit this guest, is refused with a sentence; the former chain stays."""
    bench.frontend.write(16, b"c" * PAGE)

    assert status == bench.run("set", *chain.format(image=bench.image).split())
    assert sentence in capsys.readouterr().err
    assert f"aio:{bench.image}" == bench.known()["chain"]
    assert b"c" * PAGE == bench.frontend.read(16, 8)


def test_resize_is_seen_by_the_guest(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """If an image has grown the guest sees more sectors at once; if it has shrunk, `resize` is refused."""
    os.truncate(bench.image, 2 * SIZE)
    grown = bench.run("resize")
    bench.frontend.read_facts()
    bench.frontend.write(2 * SIZE // 512 - 8, b"e" * PAGE)
    os.truncate(bench.image, SIZE)
    shrunk = bench.run("resize")
    os.truncate(bench.image, 2 * SIZE)

    assert (0, 2) == (grown, shrunk)
    assert 2 * SIZE // 512 == bench.frontend.facts.sectors
    assert "has 2 MiB" in capsys.readouterr().out


def test_policy_is_shown_and_changed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """`policy` changes the values that it names; an invalid policy is refused and changes nothing."""
    assert 0 == bench.run("policy", "enospc=report")
    assert 2 == bench.run("policy", "flush=report")
    assert 0 == bench.run("policy", "--json")
    captured = capsys.readouterr()
    policy = json.loads(captured.out.splitlines()[-1])["policy"]
    assert "enospc=report,read=retry 3 every 1s,write=report,flush=pause,away=pause" == policy
    assert "a guest takes an error for success" in captured.err
    assert 0 == bench.run("policy", "enospc=pause")


def test_upgrade_replaces_the_worker(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """After `upgrade` another process serves the disk, with the same data and the same state."""
    before = bench.known()
    reads = [bench.frontend.submit(BLKIF_OP_READ, 8 * n, 8) for n in range(16)]
    status = main(["upgrade", "--socket", bench.machine.control])
    bench.frontend.wait(reads)
    after = bench.known()

    assert 0 == status
    assert {0} == {read.status for read in reads}
    assert before["worker"] != after["worker"]
    assert "Connected" == before["state"] == after["state"]
    assert "5/xvda is served by a new process" in capsys.readouterr().out


def test_a_disk_that_there_is_not(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown disk is refused, with a list of the known ones."""
    assert 2 == main(["pause", "9/xvda", "--socket", bench.machine.control])
    said = capsys.readouterr().err
    assert "9/xvda" in said
    assert "5/xvda" in said


def test_snapshot_keeps_what_was_there(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """After a snapshot the old image stays unchanged, the new one takes the writes, and the guest reads one disk."""
    bench.frontend.write(24, b"f" * PAGE)
    leaf = tmp_path / "leaf.qcow2"
    status = bench.run("snapshot", str(leaf))
    chain = capsys.readouterr().out.strip()
    bench.frontend.write(32, b"g" * PAGE)
    bench.frontend.flush()
    old = bench.image.read_bytes()

    assert 0 == status
    assert chain.startswith(f"qcow2:{leaf}")
    assert chain == bench.known()["chain"]
    assert b"f" * PAGE + b"g" * PAGE == bench.frontend.read(24, 16)
    assert (b"f" * PAGE, bytes(PAGE)) == (old[24 * 512 :][:PAGE], old[32 * 512 :][:PAGE])
    assert 2 == bench.run("snapshot", str(leaf))
    assert "exists already" in capsys.readouterr().err
    assert chain == bench.known()["chain"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["@"], "'' is not a valid name for a snapshot"),
        (["@a/b"], "'a/b' is not a valid name"),
        (["@a@b"], "'a@b' is not a valid name"),
        (["@a\nb"], "is not a valid name"),
        (["@" + 1025 * "a"], "is not a valid name"),
        (["@monday", "--format", "qcow2"], "in no format of its own"),
    ],
)
def test_a_snapshot_that_cannot_be_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    """An invalid name for a snapshot is refused before the service is asked."""
    with answering(tmp_path / "x", working) as control:
        assert 2 == main(["snapshot", "5/xvda", *words, "--socket", control.path])
    assert [] == control.asked
    assert why in " ".join(capsys.readouterr().err.split())


def test_a_snapshot_of_the_image_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`@NAME` is sent to the service unchanged, and the snapshot's layer is printed so that it can be pasted."""
    chain = "log:|rbd:tenant\\,7/guest,id=xen"
    answer = Answer(Code.OK, {"chain": chain, "layers": []}, order=17)
    with answering(tmp_path / "x", lambda _: answer) as control:
        assert 0 == main(["snapshot", "5/xvda", "@a,b", "--socket", control.path])
    [asked] = [each for each in control.asked if each["verb"] == "snapshot"]
    assert ("5/xvda", "@a,b", "") == (asked["vbd"], asked["file"], asked["format"])
    said = capsys.readouterr().out.strip()
    assert "rbd:tenant\\,7/guest@a\\,b,id=xen" == said
    assert "a,b" == parse_chain(said).layers[0].options.image.snapshot
