"""A suite that leaves something behind: it is named, taken away, and makes the suite fail."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import places
from tests.interruption import INTERRUPTED

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tests.ci.contained", "--settle", "0.1")
pytestmark = pytest.mark.slow  # each starts processes and waits until it is sure of them


def contained(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program as a suite."""
    command = [*COMMAND, sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_what_leaves_nothing_is_as_it_was() -> None:
    """Status and output are the suite's, and its temporary directory goes with all that is in it."""
    done = contained("import sys, tempfile; print(tempfile.mkdtemp()); sys.exit(7)")

    assert (7, "left behind: nothing\n") == (done.returncode, done.stderr)
    assert not Path(done.stdout.strip()).parent.exists()


def test_a_command_may_name_its_directory() -> None:
    """`{tmp}` stands for the directory of its own."""
    command = [*COMMAND, "sh", "-c", "echo {tmp} $TMPDIR"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    first, second = done.stdout.split()
    assert first == second


def test_processes_are_found_wherever_they_went() -> None:
    """A daemon that is in a session of its own, and whose parent has ended, is killed and named."""
    done = contained(
        "import subprocess; subprocess.run(['sh', '-c', 'setsid sleep 987 >/dev/null 2>&1 & echo $!; setsid true'])"
    )

    assert 1 == done.returncode
    assert "sleep 987" in done.stderr
    assert not Path(f"/proc/{done.stdout.strip()}").exists()


@pytest.mark.parametrize("place", places.OUTSIDE)
def test_files_outside_are_found_by_their_name(place: Path) -> None:
    """What lies outside bears the directory's name; another suite's is left alone."""
    if not os.access(place, os.W_OK):
        pytest.skip("only root may write there")
    other = place / f"{places.prefix()}other"
    other.write_text("")
    done = contained(
        f"from tests import places; from pathlib import Path; d = Path('{place}') / (places.prefix() + 'x')\n"
        "d.mkdir(); (d / 'file').write_text(''); print(d)"
    )
    there = other.exists()
    other.unlink()

    assert (1, f"left behind: {done.stdout}") == (done.returncode, done.stderr)
    assert (True, False) == (there, Path(done.stdout.strip()).exists())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_mounts_are_undone() -> None:
    """A file system and a loop device of a file in the directory are let go before the directory goes."""
    done = contained(
        "import subprocess, tempfile; d = tempfile.mkdtemp()\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', d], check=True); print(d)"
    )
    if "CalledProcessError" in done.stderr:
        pytest.skip("mounting is not possible here")

    assert (1, f"left behind: mount {done.stdout}") == (done.returncode, done.stderr)
    assert not Path(done.stdout.strip()).parent.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_suite_may_tidy_up(number: signal.Signals) -> None:
    """Whatever ends it, the suite is told as by Ctrl-C, and what it leaves all the same goes away."""
    program = (
        "import signal, subprocess; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print(subprocess.Popen(['setsid', 'sleep', '988']).pid, flush=True)\n"
        "signal.sigwait([signal.SIGINT]); print('tidied up')"
    )
    with subprocess.Popen(
        [*COMMAND, sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as suite:
        assert suite.stdout is not None
        child = int(suite.stdout.readline())
        suite.send_signal(number)
        out, err = suite.communicate(timeout=60)

    assert (INTERRUPTED, "tidied up\n") == (suite.returncode, out), err
    assert "sleep 988" in err
    assert not Path(f"/proc/{child}").exists()


def test_a_suite_ends_with_whoever_started_it() -> None:
    """Where make, or its shell, is killed, nobody runs on for hours."""
    program = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "print(os.getpid(), flush=True); signal.sigwait([signal.SIGINT])"
    )
    command = ["sh", "-c", f"{' '.join(COMMAND)} {sys.executable} -c '{program}'; true"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        suite = os.pidfd_open(int(shell.stdout.readline()))
        shell.kill()
        has_ended = bool(select.select([suite], [], [], 60)[0])
        os.close(suite)
        shell.communicate(timeout=60)  # until the last of them has let go of its output

    assert has_ended
