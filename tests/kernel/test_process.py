"""A process and its relation to others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.privileges import MAY_COME_FIRST
from xenbackend.kernel import process
from xenbackend.kernel.process import AHEAD, OpenFile, boost, files_of, is_ending, state_of, unboost

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
    """A process that adopts orphans reaps a grandchild whose parent has ended; one that has stopped that does not."""
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
    """Return the nice values of all its threads relative to ours, and of its session's autogroup if there is one."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    values = {os.getpriority(os.PRIO_PROCESS, int(each.name)) - ours for each in Path(f"/proc/{pid}/task").iterdir()}
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists() and os.getsid(pid) == pid:
        values |= {int(found[1]) for found in [re.search(r"nice (-?\d+)", group.read_text())] if found}
    return values


@pytest.mark.skipif(not MAY_COME_FIRST, reason="we may not come before others")
@pytest.mark.parametrize("leads", [True, False])
def test_who_hurries_comes_first_as_a_whole(leads: bool) -> None:
    """A boost raises all threads, and the autogroup of a session that it leads, but nobody else; it can be undone."""
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
    """Boosting a process that has ended is no error; number 0, which would mean ourselves, is ignored."""
    with subprocess.Popen(["true"]) as child:
        pass
    boost(child.pid)
    unboost(child.pid)
    monkeypatch.setattr(os, "setpriority", pytest.fail)
    boost(0)


def test_what_a_process_has_open(tmp_path: Path) -> None:
    """Files with a name are listed by their present path, file system and inode."""
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
    """A process whose parent has ended before it asked for a signal gets it at once; otherwise it goes on."""
    program = f"import os; from xenbackend.kernel.process import end_with; end_with({parent}, 15)"

    assert status == subprocess.run([sys.executable, "-c", program], check=False).returncode


def test_a_process_that_the_kernel_cannot_end_yet_is_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process that still waits for what it has in flight sleeps, and has the flag PF_EXITING."""
    monkeypatch.setattr(process, "text_of", lambda _: f"7 (a) b) D 1 7 7 0 -1 {flags} 0 0 0")
    flags = 0x40_0104
    assert is_ending(7)
    flags -= 4
    assert not is_ending(7)


def test_a_process_has_a_state() -> None:
    """The state tells a running, stopped and unreaped process apart; it is empty if there is none."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        stopped = state_of(sleeper.pid)
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        ended = state_of(sleeper.pid)
        assert is_ending(sleeper.pid)

    assert ("T", "Z", "") == (stopped, ended, state_of(sleeper.pid))
    assert (True, False) == (is_ending(sleeper.pid), is_ending(os.getpid()))
    assert "R" == state_of(os.getpid())
