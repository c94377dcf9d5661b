"""The backend processes of a bench."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from xenbackend.bench.plan import BenchError
from xenbackend.bench.server import Server, _parse_list, choose_cpus


def nobody_listens() -> None:
    """Fail as a connection to a socket that is not there."""
    raise FileNotFoundError


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """A missing program is named in a sentence."""
    with pytest.raises(BenchError, match="peer: the program /no/such is not installed"):
        Server("peer", ["/no/such"], tmp_path / "log", cpu=None)


def test_a_server_that_dies_is_quoted(tmp_path: Path) -> None:
    """If a server ends before it listens, the error has its last line."""
    server = Server("peer", ["sh", "-c", "echo first; echo no such export >&2"], tmp_path / "log", cpu=None)
    with pytest.raises(BenchError, match="peer did not start: no such export"):
        server.connect(nobody_listens)
    server.close()


def test_cpu_time_is_the_process_own(tmp_path: Path) -> None:
    """A backend's CPU time is that of all its threads and of no other process."""
    code = "import time, threading, sys\nsum(range(10**6))\nprint(time.process_time(), flush=True)\nsys.stdin.read()"
    reader, writer = os.pipe()
    server = Server("python", [sys.executable, "-c", f"import os; os.dup2({reader}, 0)\n{code}"], tmp_path / "log",
                    cpu=None, keep=[reader])  # fmt: skip
    os.close(reader)

    def has_spoken() -> float:
        if not (tmp_path / "log").read_text():
            raise FileNotFoundError
        return float((tmp_path / "log").read_text())

    said = server.connect(has_spoken)

    assert said <= server.cpu_time() < said + 1

    os.close(writer)
    server.close()
    with pytest.raises(BenchError, match="python ended during the measurement"):
        server.cpu_time()


def test_a_server_is_pinned(tmp_path: Path) -> None:
    """A backend runs on the CPU that it was given and on no other."""
    cpu = min(os.sched_getaffinity(0))
    server = Server("cat", ["sleep", "60"], tmp_path / "log", cpu=cpu)

    assert {cpu} == os.sched_getaffinity(server.pid)

    server.close()


def test_two_cpus_on_two_cores() -> None:
    """The backend and the load never share a CPU."""
    chosen = choose_cpus()

    assert chosen is None or len(set(chosen)) == 2


def test_lists_of_cpus() -> None:
    """Sets of CPUs are parsed from the kernel's numbers and ranges."""
    assert {0, 1, 2, 8} == _parse_list("0-2,8\n")
