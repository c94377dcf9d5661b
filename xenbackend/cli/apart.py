"""Runs a command in a process of its own, so that Ctrl-C ends it even if its storage does not answer.

Must not be used once a second thread runs or a file is open. Nothing, not even SIGKILL, ends a process that is in a
call to dead storage, or one of whose threads is, until the storage answers. So a shell that waits for the command waits
for its parent, which touches no storage.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

from xenbackend.errors import printable
from xenbackend.kernel.process import end_with, files_of, kill

PATIENCE_S = 3.0  # for a command to end when told: it may be in a step that ends with a flush
_LAST_S = 0.5  # for its end by force
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FROM_TERMINAL = 0x80  # si_code SI_KERNEL, asm-generic/siginfo.h: the terminal tells all processes in its foreground
_STANDARD = 3  # descriptors that are not the command's own


def split() -> int | None:
    """Fork. Return None in the new process, which does the command; in this one its exit status once it has ended.

    The status is 128 plus a signal's number if a signal ended it, or told it to end and it does not end soon.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    heeded = [each for each in _ENDING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup(1) ignores one
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, [*heeded, signal.SIGCHLD])
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        end_with(parent, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        return None
    pidfd = os.pidfd_open(child)
    try:
        return _wait(child, pidfd, heeded)
    finally:
        os.close(pidfd)


def _wait(child: int, pidfd: int, heeded: Iterable[signal.Signals]) -> int:
    """Wait until the child has ended, or does not end although it was told to; return the exit status."""
    told = 0  # the signal that came first
    give_up = 0.0
    while (status := _ended(child)) is None:
        left = give_up - time.monotonic() if told else 3600.0
        came = signal.sigtimedwait({*heeded, signal.SIGCHLD}, max(0.0, left))
        if came is None and told:
            return _give_up(child, pidfd, told)
        if came is None or came.si_signo == signal.SIGCHLD:
            continue
        if told and came.si_signo == signal.SIGINT:  # a second Ctrl-C: the operator does not want to wait
            return _give_up(child, pidfd, told)
        if came.si_code != _FROM_TERMINAL:
            signal.pidfd_send_signal(pidfd, came.si_signo)
        told = told or came.si_signo
        give_up = time.monotonic() + PATIENCE_S
    return status


def _ended(child: int, options: int = os.WNOHANG) -> int | None:
    pid, status = os.waitpid(child, options)
    if not pid:
        return None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _give_up(child: int, pidfd: int, told: int) -> int:
    """Kill the child, and print what it waits for; return the exit status."""
    names = [each.path for each in files_of(pidfd) if each.path.startswith("/") and not _is_common(each.path)]
    kill(pidfd)
    give_up = time.monotonic() + _LAST_S
    while (is_left := _ended(child) is None) and time.monotonic() < give_up:
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)
    sentence = "it did not end in time, and was killed"
    if is_left:
        which = f" of {', '.join(map(printable, names))}" if names else ""
        sentence = f"the storage{which} does not answer; process {child} will end when it does"
    print(f"xenbackend: ended by {signal.Signals(told).name}: {sentence}", file=sys.stderr)
    return 128 + told


def _is_common(path: str) -> bool:
    """Return whether a path is not an image: a terminal, a memory, a file that our output goes to."""
    return path.startswith(("/memfd:", "/dev/pts/", "/dev/null", "/dev/tty", "/proc/")) or path in _outputs()


def _outputs() -> set[str]:
    found = set()
    for fd in range(_STANDARD):
        try:
            found.add(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115 - pathlib would alter the name
        except OSError:
            continue
    return found
