"""A process's place among others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.privileges import MAY_COME_FIRST
from xenbackend.kernel.process import AHEAD, OpenFile, boost, files_of, state_of, unboost

# The shell in between ends first; then its child does, with status 7.
_PROGRAM = """
import os, subprocess
from xenbackend.kernel.process import adopt_orphans
near, far = os.pipe()
script = f"(read line; exit 7) <&{near} >&- & echo $!"
def outlive():
    return int(subprocess.run(["sh", "-c", script], pass_fds=[near], stdout=subprocess.PIPE, check=True).stdout)
adopt_orphans(does=True)
ours = outlive()
adopt_orphans(does=False)
theirs = outlive()
os.close(far)
for orphan in (ours, theirs):
    try:
        print(os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]))
    except ChildProcessError:
        print("another's")
"""


@pytest.mark.slow
def test_orphans_come_to_who_adopts_them() -> None:
    """Who adopts orphans waits for a grandchild whose parent has ended; who does not any more knows nothing of it."""
    said = subprocess.run([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True, check=True).stdout

    assert ["7", "another's"] == said.split("\n")[:2]


_LEADER = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
threading.Event().wait()
"""
_FOLLOWER = "print(flush=True); input()"


def _nice_values(pid: int) -> set[int]:
    """Return those of all its threads beside ours, and that of its session's group where there are such groups."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    values = {os.getpriority(os.PRIO_PROCESS, int(each.name)) - ours for each in Path(f"/proc/{pid}/task").iterdir()}
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists() and os.getsid(pid) == pid:
        values |= {int(found[1]) for found in [re.search(r"nice (-?\d+)", group.read_text())] if found}
    return values


@pytest.mark.skipif(not MAY_COME_FIRST, reason="we may not come before others")
@pytest.mark.parametrize("leads", [True, False])
def test_who_hurries_comes_first_as_a_whole(leads: bool) -> None:
    """Every thread does, and the group of a session that it leads, but nobody else; then all are as they were."""
    ours, group = os.getpriority(os.PRIO_PROCESS, 0), Path("/proc/self/autogroup")
    before = group.read_text() if group.exists() else ""
    with subprocess.Popen(
        [sys.executable, "-c", _LEADER if leads else _FOLLOWER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=leads,
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            child.stdout.readline()
            boost(child.pid)
            ahead = _nice_values(child.pid)
            unboost(child.pid)
            after = _nice_values(child.pid)
        finally:
            child.kill()

    assert ({-AHEAD}, {0}) == (ahead, after)
    assert (ours, before) == (os.getpriority(os.PRIO_PROCESS, 0), group.read_text() if group.exists() else "")


def test_who_has_gone_hurries_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no error; nor is it we who boost, for whom the kernel would take a process without a number."""
    with subprocess.Popen(["true"]) as child:
        pass
    boost(child.pid)
    unboost(child.pid)
    monkeypatch.setattr(os, "setpriority", pytest.fail)
    boost(0)


def test_what_a_process_has_open(tmp_path: Path) -> None:
    """Files with a name are told: where they are by now, on which file system, and their number there."""
    image = tmp_path / "an \n image"
    image.write_bytes(b"x")
    with image.open() as file:
        process = subprocess.Popen(["sleep", "100"], stdin=file, stdout=subprocess.PIPE)
    moved = image.rename(tmp_path / "moved")
    pidfd = os.pidfd_open(process.pid)
    found = files_of(pidfd)
    process.kill()
    process.communicate()

    status = moved.stat()
    assert OpenFile(str(moved), status.st_dev, status.st_ino) in found
    assert all(each.path.startswith("/") for each in found)
    assert [] == files_of(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize(("parent", "status"), [("os.getppid()", 0), ("os.getpid()", -signal.SIGTERM)])
def test_a_process_ends_with_its_parent(parent: str, status: int) -> None:
    """One whose parent has ended before it could ask for that gets the signal at once; another one goes on."""
    program = f"import os; from xenbackend.kernel.process import end_with; end_with({parent}, 15)"

    assert status == subprocess.run([sys.executable, "-c", program], check=False).returncode


def test_a_process_has_a_state() -> None:
    """One that sleeps, was stopped, has ended and is not waited for, and one that is not there."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        stopped = state_of(sleeper.pid)
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        ended = state_of(sleeper.pid)

    assert ("T", "Z", "") == (stopped, ended, state_of(sleeper.pid))
    assert "R" == state_of(os.getpid())
