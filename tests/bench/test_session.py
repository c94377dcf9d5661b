"""Whole sessions: our worker and the installed peers, in short."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from tests import qemu
from xenbackend.bench import target
from xenbackend.bench.plan import SECTOR, SMALLEST, BenchError, select_works
from xenbackend.bench.session import Session, bench_file, run
from xenbackend.errors import ConfigError

BENCH = """
import argparse, signal, sys
from xenbackend.cli import bench
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
parser = argparse.ArgumentParser()
bench.register(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""


def quick(tmp_path: Path, *works: str) -> Session:
    """A session as short as can be."""
    return Session(
        chains=["aio:{file},cache=on"],
        works=select_works(list(works), read_only=False),
        file=tmp_path / "a file, odd|name",
        size=SMALLEST,
        rounds=1,
        seconds=0.05,
        warm_up=0.01,
    )


def children() -> list[str]:
    """The processes that we started and that still live."""
    tasks = Path("/proc/self/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def ignore(_text: str, _total: int) -> None:
    """Take progress for granted."""


def test_bench_file_is_stamped_and_removed(tmp_path: Path) -> None:
    """Every sector carries its number while the file is there, and it is gone afterwards."""
    path = tmp_path / "file"
    with bench_file(path, SMALLEST):
        words = array("Q", path.read_bytes())

        assert array("Q", range(SMALLEST // SECTOR)) == words[:: SECTOR // 8]

    assert not path.exists()


def test_nothing_of_the_operators_is_overwritten(tmp_path: Path) -> None:
    """A file that exists is not ours, whatever is in it."""
    (tmp_path / "file").write_text("precious")
    with (
        pytest.raises(ConfigError, match="exists; a bench makes its own file"),
        bench_file(tmp_path / "file", SMALLEST),
    ):
        pass

    assert (tmp_path / "file").read_text() == "precious"


def test_a_bench_file_that_cannot_be_made(tmp_path: Path) -> None:
    """A directory that is not there, or a size that is too small, is one sentence."""
    with pytest.raises(ConfigError, match="cannot be made: No such file"), bench_file(tmp_path / "no" / "f", SMALLEST):
        pass
    with pytest.raises(ConfigError, match="takes at least 64 MiB"), bench_file(tmp_path / "f", 1 << 20):
        pass


@pytest.mark.slow
def test_every_workload_on_a_worker(tmp_path: Path) -> None:
    """A real worker serves every workload, all reads checked, and the session leaves nothing behind."""
    before = os.sched_getaffinity(0)
    outcome = run(quick(tmp_path), ignore)

    assert [work.name for work in select_works([], read_only=False)] == [each.work.name for each in outcome.measured]
    for each in outcome.measured:
        assert each.samples[0].requests > 0
        assert each.samples[0].backend_cpu > 0
    assert ([], [], before) == (list(tmp_path.iterdir()), children(), os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent grants", "grant copies"])
def test_guests_that_sleep(tmp_path: Path, persistent: bool) -> None:
    """No wake-up is lost between a worker and a generator that always sleeps, with either kind of grants."""
    session = replace(quick(tmp_path, "rr4k", "sr64k"), poll=0.0, persistent=persistent)

    assert all(each.samples[0].requests > 0 for each in run(session, ignore).measured)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_peers_take_their_turns(tmp_path: Path, direct: bool) -> None:
    """Each installed peer is measured in each round after our chains, and ends with the session."""
    steps: list[str] = []
    # Long enough for a peer that others on the host keep waiting: fio's time is the clock's.
    session = replace(quick(tmp_path, "rr4k"), compare=True, direct=direct, rounds=2, seconds=0.3)
    outcome = run(session, lambda text, _total: steps.append(text))
    names = [each.target for each in outcome.measured]

    assert len(target.peers(direct=direct)) + 1 == len(names)
    assert [f"round {number}" for number in (1, 2) for _ in names] == [text.partition(" of")[0] for text in steps]
    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "driver", "works"), [("qcow2", "qcow2", ["rr4k", "rw4k", "fw4k"]), ("vdi", "vdi", ["rr4k"])]
)
def test_images(tmp_path: Path, image: str, driver: str, works: list[str]) -> None:
    """An image is measured with its reads checked, first writes on one that is new each time, QEMU on the same."""
    qemu.qemu_img("--version")
    works_of = select_works(works, read_only=False, image=True)
    session = replace(quick(tmp_path), works=works_of, image=image, rounds=2, seconds=0.3)
    outcome = run(replace(session, chains=[driver + ":{file},cache=on"], compare=True), ignore)

    peers = [peer.program for peer in target.peers(direct=False, image=True)]
    assert len(works) * (1 + len(peers)) == len(outcome.measured)
    assert all(sample.requests > 0 for each in outcome.measured for sample in each.samples)
    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
def test_a_chain_of_the_operators_is_only_read(tmp_path: Path) -> None:
    """A chain that does not name the bench file is opened read-only, so that not even we can write to it."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SMALLEST))
    session = replace(quick(tmp_path, "rw4k"), chains=[f"aio:{disk},cache=on"])
    with pytest.raises(BenchError, match="answered a request with an error"):
        run(session, ignore)

    assert bytes(SMALLEST) == disk.read_bytes()
    assert run(replace(session, overwrite=True), ignore).measured[0].samples[0].requests > 0


def test_a_chain_that_does_not_open_leaves_nothing(tmp_path: Path) -> None:
    """A worker's refusal is the session's, in its own words, and everything is put away."""
    session = replace(quick(tmp_path, "rr4k"), chains=["nul:1G"])
    with pytest.raises(BenchError, match="unknown driver 'nul'"):
        run(session, ignore)

    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_bench_puts_everything_away(tmp_path: Path, number: signal.Signals) -> None:
    """A bench that is interrupted ends its backends, and removes its file and its sockets."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    file = ["--file", str(tmp_path / "file"), "--size", "64M"]
    with subprocess.Popen(
        [sys.executable, "-c", BENCH, "bench", "aio:{file},cache=on", "--work", "rr4k", "--seconds", "60", *file],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as bench:  # fmt: skip
        backends: list[str] = []
        while not backends and bench.poll() is None:
            backends = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        backend = os.pidfd_open(int(backends[0]))
        bench.send_signal(number)
        bench.communicate()

    assert bench.returncode != 0
    assert [] == list(tmp_path.iterdir())
    assert [backend] == select.select([backend], [], [], 10)[0]

    os.close(backend)
