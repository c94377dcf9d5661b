"""Whole short sessions with our worker and the installed peers."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from tests import qemu
from tests.built_once import _built_once, built  # noqa: F401 - fixtures
from xenbackend.bench import calls, native, target
from xenbackend.bench.plan import SMALLEST, BenchError, select_works
from xenbackend.bench.session import NEVER_LOOKS, Session, bench_file, run
from xenbackend.errors import ConfigError
from xenbackend.units import SECTOR

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
    """The shortest possible session."""
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
    """Return the processes that we started and that still run."""
    tasks = Path("/proc/self/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def children_of(pid: int) -> list[str]:
    """Return the processes that the main thread of another one started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def command_of(pid: str) -> str:
    """Return a process's command line, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


HAS_COMPILER = any(map(shutil.which, native.COMPILERS))


def ignore(_text: str, _total: int) -> None:
    """Ignore progress."""


def test_bench_file_is_stamped_and_removed(tmp_path: Path) -> None:
    """Every sector of the bench file carries its number, and the file is removed afterwards."""
    path = tmp_path / "file"
    with bench_file(path, SMALLEST):
        words = array("Q", path.read_bytes())

        assert array("Q", range(SMALLEST // SECTOR)) == words[:: SECTOR // 8]

    assert not path.exists()


def test_nothing_of_the_operators_is_overwritten(tmp_path: Path) -> None:
    """An existing file is refused, whatever it contains."""
    (tmp_path / "file").write_text("precious")
    with (
        pytest.raises(ConfigError, match="exists; name a file that does not"),
        bench_file(tmp_path / "file", SMALLEST),
    ):
        pass

    assert (tmp_path / "file").read_text() == "precious"


def test_a_bench_file_that_cannot_be_made(tmp_path: Path) -> None:
    """A missing directory or too small a size is refused with a sentence."""
    with pytest.raises(ConfigError, match="cannot be made: No such file"), bench_file(tmp_path / "no" / "f", SMALLEST):
        pass
    with pytest.raises(ConfigError, match="needs at least 64 MiB"), bench_file(tmp_path / "f", 1 << 20):
        pass


@pytest.mark.slow
def test_every_workload_on_a_worker(tmp_path: Path) -> None:
    """A real worker serves every workload, all reads are checked, and nothing is left of the session."""
    before = os.sched_getaffinity(0)
    outcome = run(quick(tmp_path), ignore)

    assert [work.name for work in select_works([], read_only=False)] == [each.work.name for each in outcome.measured]
    for each in outcome.measured:
        assert each.samples[0].requests > 0
        assert each.samples[0].backend_cpu > 0
    assert ([], [], before) == (list(tmp_path.iterdir()), children(), os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("client", ["Python", "C"])
def test_the_clients_language_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Without a compiler our chains are measured with the Python client and without a limit, and the report says so."""
    if client == "C" and not HAS_COMPILER:
        pytest.skip("no C compiler is installed")
    if client == "Python":
        monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(target, "PEERS", {})
    outcome = run(replace(quick(tmp_path, "rr4k"), compare=True), ignore)

    assert {client} == {each.client for each in outcome.measured}
    assert (client == "C") == ("C limit" in [each.target for each in outcome.measured])
    assert (client == "Python") == any("no C compiler (no-such-compiler)" in note for note in outcome.notes)


@pytest.mark.slow
def test_the_limit_with_either_kind_of_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring server in C serves all workloads for a client that sleeps, with persistent grants and with copies."""
    if not HAS_COMPILER:
        pytest.skip("no C compiler is installed")
    monkeypatch.setattr(target, "PEERS", {})
    session = replace(quick(tmp_path), compare=True, poll=0.0)
    for persistent in (True, False):
        measured = run(replace(session, persistent=persistent), ignore).measured
        limit = [each for each in measured if each.target == "C limit"]

        assert len(select_works([], read_only=False)) == len(limit)
        assert all(each.samples[0].requests > 0 and each.samples[0].rested is None for each in limit)


@pytest.mark.slow
def test_loops_beside_it(tmp_path: Path) -> None:
    """Each chain is measured with and without polling, and the loops' share is known for both."""
    before = os.sched_getaffinity(0)
    outcome = run(replace(quick(tmp_path, "rr4k-1"), beside="equal"), ignore)

    assert ["aio:{file},cache=on", "aio:{file},cache=on" + NEVER_LOOKS] == [each.target for each in outcome.measured]
    for each in outcome.measured:
        assert 0 < each.samples[0].loops < 1.5 * len(before)  # what is read one after the other, on a busy host
        assert 0 <= each.samples[0].rested <= 1
    assert outcome.measured[1].samples[0].rested > 0.5
    assert ([], [], before) == (list(tmp_path.iterdir()), children(), os.sched_getaffinity(0))


@pytest.mark.slow
@pytest.mark.parametrize("has_tool", [True, False])
def test_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_tool: bool) -> None:
    """A worker makes about one call for each request; without a tool to count them there is a note."""
    if not has_tool:
        monkeypatch.setattr(calls, "_begin_perf", lambda *_: calls._start("perf", ["/no/perf"]))
        monkeypatch.setattr(calls, "_begin_strace", lambda *_: calls._start("strace", ["/no/strace"]))
    outcome = run(replace(quick(tmp_path, "rr4k"), calls=True), ignore)
    (measured,) = outcome.measured
    if any("not counted" in note for note in outcome.notes):
        reason = "System calls were not counted: perf is not installed; strace is not installed."

        assert has_tool or [reason] == outcome.notes
        assert measured.calls is None
    else:
        assert has_tool
        assert 0.9 < measured.calls < 3
    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent grants", "grant copies"])
def test_guests_that_sleep(tmp_path: Path, persistent: bool) -> None:
    """No wake-up is lost between a worker and a generator that always sleeps, with either kind of grants."""
    session = replace(quick(tmp_path, "rr4k", "sr64k"), poll=0.0, persistent=persistent)

    assert all(each.samples[0].requests > 0 for each in run(session, ignore).measured)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_peers_take_their_turns(tmp_path: Path, direct: bool) -> None:
    """Each installed peer is measured in each round, after our chains and the limit, and ends with the session."""
    steps: list[str] = []
    # Long enough for a peer that has to wait for the CPU: fio's time is that of the clock.
    session = replace(quick(tmp_path, "rr4k"), compare=True, direct=direct, rounds=2, seconds=0.15)
    outcome = run(session, lambda text, _total: steps.append(text))
    names = [each.target for each in outcome.measured]

    assert ["aio:{file},cache=on", *["C limit"] * HAS_COMPILER] == names[: 1 + HAS_COMPILER]
    assert len(target.peers(direct=direct)) + 1 + HAS_COMPILER == len(names)
    assert {"C", "Python", ""} >= {each.client for each in outcome.measured}
    assert [f"round {number}" for number in (1, 2) for _ in names] == [text.partition(" of")[0] for text in steps]
    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
@pytest.mark.parametrize(("image", "driver", "works"), [("qcow2", "qcow2", ["rr4k", "fw4k"]), ("vdi", "vdi", ["rr4k"])])
def test_images(tmp_path: Path, image: str, driver: str, works: list[str]) -> None:
    """An image's reads are checked; first writes use a new image each time; QEMU is measured on the same image."""
    qemu.qemu_img("--version")
    works_of = select_works(works, read_only=False, image=True)
    session = replace(quick(tmp_path), works=works_of, image=image, rounds=2, seconds=0.1)
    outcome = run(replace(session, chains=[driver + ":{file},cache=on"], compare=True), ignore)

    peers = [peer.program for peer in target.peers(direct=False, image=True)]
    assert len(works) * (1 + len(peers)) == len(outcome.measured)
    assert all(sample.requests > 0 for each in outcome.measured for sample in each.samples)
    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
def test_a_chain_of_the_operators_is_only_read(tmp_path: Path) -> None:
    """A chain that does not use the bench file is opened read-only."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SMALLEST))
    session = replace(quick(tmp_path, "rw4k"), chains=[f"aio:{disk},cache=on"])
    with pytest.raises(BenchError, match="answered a request with an error"):
        run(session, ignore)

    assert bytes(SMALLEST) == disk.read_bytes()
    assert run(replace(session, overwrite=True), ignore).measured[0].samples[0].requests > 0


def test_a_chain_that_does_not_open_leaves_nothing(tmp_path: Path) -> None:
    """If a worker refuses a chain, the session ends with that reason, and everything is cleaned up."""
    session = replace(quick(tmp_path, "rr4k"), chains=["nul:1G"])
    with pytest.raises(BenchError, match="unknown driver 'nul'"):
        run(session, ignore)

    assert ([], []) == (list(tmp_path.iterdir()), children())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "program"),
    [(signal.SIGINT, "xenbackend.worker"), (signal.SIGTERM, "xenbackend.worker"), (signal.SIGTERM, "")],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM at once"],
)
def test_an_interrupted_bench_puts_everything_away(tmp_path: Path, number: signal.Signals, program: str) -> None:
    """An interrupted bench ends its backends or its compiler, and removes its file and sockets."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    file = ["--file", str(tmp_path / "file"), "--size", "64M"]
    with subprocess.Popen(
        [sys.executable, "-c", BENCH, "bench", "aio:{file},cache=on", "--work", "rr4k", "--seconds", "60", *file],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as bench:  # fmt: skip
        backends: list[str] = []
        while not backends and bench.poll() is None:
            backends = [each for each in children_of(bench.pid) if program in command_of(each)]
        backend = os.pidfd_open(int(backends[0]))
        bench.send_signal(number)
        bench.communicate()

    assert bench.returncode != 0
    assert [] == list(tmp_path.iterdir())
    assert [backend] == select.select([backend], [], [], 10)[0]

    os.close(backend)
