"""Commands that ask the service cost little: they run for each disk of a host, and in monitoring every few seconds."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.answering import answering, working

DEAR = ("rich", "structlog", "pyxs", "asyncio", "logging", "subprocess", "daemon", "zstandard", "shutil")
LIGHT = [
    "status", "status --json", "status 5/xvda", "metrics", "orders", "orders 17 --json", "pause 5/xvda",
    "resume 5/xvda",
    "set 5/xvda 'log:|aio:/new' --timeout 5", "set 5/xvda aio:/new --dry-run --json", "resize 5/xvda",
    "snapshot 5/xvda /new", "policy 5/xvda enospc=report", "upgrade 5/xvda", "upgrade", "stop", "log get 5/xvda",
    "log status 5/xvda --json", "attach foo x:", "detach foo",
]  # fmt: skip
CPU_S = 0.1  # twice what a command took on the machine where it was measured
GENEROUS = 3  # for caches that other processes use


def command(line: str, socket: str, before: str = "", after: str = "") -> list[str]:
    """Return the words that run a command in a process of its own, with Python before and after it."""
    where = [] if line.startswith(("attach", "detach")) else ["--socket", socket]
    words = [*shlex.split(line), *where]
    run = f"from xenbackend.cli.main import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
    return [sys.executable, "-c", f"{before}\n{run}{after}"]


@pytest.mark.slow
@pytest.mark.parametrize("line", LIGHT)
def test_it_imports_no_supervisor_and_nothing_dear(tmp_path: Path, line: str) -> None:
    """These commands import neither the service nor anything that draws."""
    after = "import sys\nprint(*sorted(sys.modules), file=sys.stderr)"
    with answering(tmp_path / "x", working) as control:
        words = command(line, control.path, after=after)
        result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    modules = set(result.stderr.split("\n")[-2].split())

    assert "xenbackend.cli.main" in modules
    assert set() == modules & set(DEAR)
    assert [] == [each for each in modules if each.startswith(("xenbackend.supervisor", "xenbackend.worker"))]


@pytest.mark.slow
@pytest.mark.parametrize("line", ["status", "status --json", "pause 5/xvda", "set 5/xvda 'log:|aio:/new'"])
def test_it_takes_little_cpu(tmp_path: Path, line: str) -> None:
    """The CPU time of the best of five runs has a limit; importing the supervisor would take twice that."""
    spent = []
    with answering(tmp_path / "x", working) as control, (tmp_path / "out").open("wb") as out:
        for _ in range(5):
            process = subprocess.Popen(command(line, control.path), stdout=out)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert 0 == process.returncode
            spent.append(usage.ru_utime + usage.ru_stime)

    assert min(spent) < CPU_S * GENEROUS
