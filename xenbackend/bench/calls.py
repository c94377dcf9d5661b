"""Counts the system calls of a process from outside, by perf or, if that is not possible, by strace.

Must not be used while something is timed: strace makes a process many times slower, and perf costs 0.1 us per call.

A server that strace slows down finds more requests each time it looks, and makes fewer calls per request than it would
otherwise. So the figure is a lower bound, and a good estimate at depth 1.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from xenbackend.errors import XenbackendError

_PATIENCE = 10.0  # seconds that a tool may take to begin or to end
_EVENT = "raw_syscalls:sys_enter"


class Uncountable(XenbackendError):
    """No tool on this host can count the system calls of a process."""


class Counting:
    """A running count by a tool; `end` must be called."""

    def __init__(self, tool: str, process: subprocess.Popen[bytes], result: Path, parse: Callable[[str], int]) -> None:
        self.tool = tool
        self._process = process
        self._result = result
        self._parse = parse

    def await_sign(self, fd: int, sign: bytes) -> None:
        """Wait until the tool has written `sign` to `fd`. Raises: Uncountable, with the tool's own message."""
        said = b""
        deadline = time.monotonic() + _PATIENCE
        while sign not in said:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(fd, 4096) if ready else b""
            if not data:
                self._process.kill()
                _, errors = self._process.communicate()
                lines = (said + errors).decode(errors="replace").split("\n")
                why = next((line.strip() for line in lines if line.strip()), "it gives no reason")
                raise Uncountable(f"{self.tool} cannot count system calls here: {why}")
            said += data

    def end(self) -> int:
        """Stop counting, and return the number of calls since the tool was ready. Raises: Uncountable."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        try:
            return self._parse(self._result.read_text())
        except (OSError, ValueError, IndexError, StopIteration):
            raise Uncountable(f"{self.tool} wrote no count of system calls") from None


def begin(pid: int, directory: Path) -> Counting:
    """Begin to count the calls of all threads of a process. Raises: Uncountable, with the reason for each tool.

    Args:
        pid: of the process.
        directory: for the files that the tools write.
    """
    reasons = []
    for tool in (_begin_perf, _begin_strace):
        try:
            return tool(pid, directory)
        except Uncountable as error:
            reasons.append(str(error))
    raise Uncountable("; ".join(reasons))


def _start(tool: str, arguments: list[str], keep: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    try:
        # A process group of its own, so that Ctrl-C at the terminal reaches only us.
        return subprocess.Popen(
            arguments, stdin=null, stdout=null, stderr=subprocess.PIPE, pass_fds=keep, process_group=0
        )
    except FileNotFoundError:
        raise Uncountable(f"{tool} is not installed") from None


def _begin_perf(pid: int, directory: Path) -> Counting:
    """Let perf attach with counting disabled, then enable it: perf-stat(1), "--control"."""
    result = directory / "perf.txt"
    commands, our_commands = os.pipe()
    our_answers, answers = os.pipe()
    arguments = ["perf", "stat", "--field-separator", ",", "--event", _EVENT, "--output", str(result)]
    arguments += ["--pid", str(pid), "--delay", "-1", "--control", f"fd:{commands},{answers}"]
    try:
        try:
            process = _start("perf", arguments, (commands, answers))
        finally:
            os.close(commands)
            os.close(answers)
        counting = Counting("perf", process, result, parse_perf)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `await_sign` reports why
            os.write(our_commands, b"enable\n")
        counting.await_sign(our_answers, b"ack\n")
        return counting
    finally:
        os.close(our_commands)
        os.close(our_answers)


def _begin_strace(pid: int, directory: Path) -> Counting:
    result = directory / "strace.txt"
    process = _start("strace", ["strace", "-c", "-f", "-o", str(result), "-p", str(pid)])
    assert process.stderr is not None  # noqa: S101 - it is a pipe
    counting = Counting("strace", process, result, parse_strace)
    counting.await_sign(process.stderr.fileno(), b"attached")
    return counting


def parse_perf(text: str) -> int:
    """Return the count in perf's output. Raises: ValueError, StopIteration."""
    count = next(line for line in text.split("\n") if _EVENT in line).partition(",")[0]
    return 0 if count == "<not counted>" else int(count)  # perf writes this if the process did not run


def parse_strace(text: str) -> int:
    """Return the total in strace's table: % time, seconds, usecs/call, calls, errors if any, "total".

    Raises: ValueError, IndexError, StopIteration.
    """
    total = next(line for line in reversed(text.split("\n")) if line.endswith("total"))
    return int(total.split()[3])
