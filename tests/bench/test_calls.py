"""Counting system calls with the tools that are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenbackend.bench import calls

# Reads a number, makes that many calls in each of two threads, and reports when they are done.
PROGRAM = """
import os, threading
def work(count):
    for _ in range(count):
        os.getppid()
print(flush=True)
while line := input():
    threads = [threading.Thread(target=work, args=(int(line),)) for _ in range(2)]
    for each in threads: each.start()
    for each in threads: each.join()
    print(flush=True)
"""
TOOLS = {"perf": calls._begin_perf, "strace": calls._begin_strace}


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """A process that makes as many calls as it is told."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.stdin.write("\n")


def make_calls(process: subprocess.Popen[str], count: int) -> None:
    """Let the process make 2 * count calls, and wait for them."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    process.stdout.readline()


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_the_calls_of_all_threads_are_counted(tool: str, process: subprocess.Popen[str], tmp_path: Path) -> None:
    """Once a tool is ready, exactly the calls made from then on, by all threads, are counted."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    make_calls(process, 1000)
    try:
        counting = TOOLS[tool](process.pid, tmp_path)
    except calls.Uncountable as error:
        pytest.skip(str(error))
    make_calls(process, 500)
    count = counting.end()
    make_calls(process, 1000)

    assert 1000 <= count < 1200


@pytest.mark.slow
def test_a_process_that_has_gone_cannot_be_counted(tmp_path: Path) -> None:
    """For a process that has gone each tool's own reason is reported, and no tool is left running."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(calls.Uncountable, match=r"perf .*; strace "):
        calls.begin(process.pid, tmp_path)


def test_without_tools_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a tool the error names those that would do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(calls.Uncountable, match="perf is not installed; strace is not installed"):
        calls.begin(os.getpid(), tmp_path)


def test_perfs_list() -> None:
    """The count is the first field of perf's list; a process that did not run has none."""
    line = ",,raw_syscalls:sys_enter,100,100.00,,\n"

    assert (1234, 0) == (calls.parse_perf(f"# started\n\n1234{line}"), calls.parse_perf(f"\n<not counted>{line}"))
    with pytest.raises(ValueError, match="not supported"):
        calls.parse_perf(f"<not supported>{line}")


def test_straces_table() -> None:
    """The count is in the last line of strace's table, with or without a column of errors."""
    head = "% time     seconds  usecs/call     calls    errors syscall\n------ ----------- ----------- --------- ---\n"

    assert 42 == calls.parse_strace(head + "100.00    0.000100           1        42           total\n")
    assert 43 == calls.parse_strace(head + "100.00    0.000100           1        43         7 total\n")
