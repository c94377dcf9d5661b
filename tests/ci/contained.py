"""`python -m tests.ci.contained COMMAND...`: runs a suite, and checks that it has left nothing when it has ended.

Must not decide whether the suite was right: the exit status is the suite's, or 1 if that was 0 and something was left.
Processes, mounts, loop devices and files that are left are named, and removed.

The suite gets a temporary directory of its own (`TMPDIR`; `{tmp}` in the command stands for it). Files that it makes
elsewhere have names that begin with that directory's (`tests/places.py`), so that two suites on one machine do not
remove each other's. Its processes are known by descent: orphans become children of this process (prctl(2), SUBREAPER).

At SIGINT, SIGTERM or SIGHUP, or when its parent has ended, it interrupts the suite, as Ctrl-C does, and gives it
PATIENCE_S to tidy up.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.interruption import INTERRUPTED
from tests.places import OUTSIDE

PATIENCE_S = 20.0  # after an interruption, for the suite to tidy up
DEAD_S = 30.0  # for killed processes to be gone; the kernel may have to wait for a disk first
LOOK_S = 0.02
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Suite:
    """A command that runs, with all that descends from it."""

    def __init__(self, command: Sequence[str], tmp: Path) -> None:
        self._is_interrupted = False
        self._give_up: float | None = None
        words = [word.replace("{tmp}", str(tmp)) for word in command]
        for number in _SIGNALS:
            signal.signal(number, self._interrupt)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until we know to which process to pass them on
        environment = {**os.environ, "TMPDIR": str(tmp)}
        self._pid = os.posix_spawnp(words[0], words, environment, setsigdef=_SIGNALS, setsigmask=[])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _interrupt(self, _number: int, _frame: object) -> None:
        """Ask the suite to end; the second time, force it."""
        if self._is_interrupted:
            self._give_up = time.monotonic()
            return
        self._is_interrupted, self._give_up = True, time.monotonic() + PATIENCE_S
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGINT)

    def wait(self) -> int:
        """Return the suite's exit status once it has ended, INTERRUPTED if it was interrupted."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == self._pid:
                return INTERRUPTED if self._is_interrupted else os.waitstatus_to_exitcode(status) % 256
            if not pid:
                if self._give_up is not None and time.monotonic() > self._give_up:
                    os.kill(self._pid, signal.SIGKILL)
                _pause()


def main(arguments: Sequence[str]) -> int:
    """Run the command, remove what it left, and return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.ci.contained", description="Run a suite, and let nothing of it stay.")
    parser.add_argument(
        "--settle",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="for processes that are just ending when it has ended (%(default)s)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    tmp = Path(tempfile.mkdtemp(prefix="xb-"))
    status = Suite(args.command, tmp).wait()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the rest takes only a moment, and must be done
    left = take_away(tmp, args.settle)
    print("\n".join(f"left behind: {each}" for each in left or ["nothing"]), file=sys.stderr, flush=True)
    return status or int(bool(left))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


def take_away(tmp: Path, settle_s: float) -> list[str]:
    """End, unmount and remove everything that a suite with this temporary directory left, and return what it was.

    Files in the directory itself are expected, and not reported.
    """
    left = _end_processes(settle_s)
    places = [tmp, *_outside(tmp.name)]
    for point in reversed([each for each in _mount_points() if _is_below(each, places)]):
        left.append(f"mount {point}")
        subprocess.run(["umount", "--lazy", point], check=False)
    for device, file in _loop_devices():
        if _is_below(file, places):
            left.append(f"loop device {device} of {file}")
            subprocess.run(["losetup", "--detach", device], check=False)
    for path in places[1:]:
        left.append(str(path))
        _remove(path)
    _remove(tmp)
    return left


def _end_processes(settle_s: float) -> list[str]:
    """Kill descendants of this process that do not end by themselves in time; return which they were."""
    killed: dict[int, str] = {}
    give_up = time.monotonic() + settle_s
    while True:
        _reap()
        there = dict(_descendants())
        if not there or time.monotonic() > give_up + DEAD_S:
            return [f"process {pid}: {words}" for pid, words in killed.items()]
        if time.monotonic() > give_up:
            killed |= there
            for pid in there:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        _pause()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants() -> Iterator[tuple[int, str]]:
    """Yield the numbers and command lines of all processes below this one."""
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):
                # proc_pid_stat(5): the name, in brackets, may hold anything
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        if os.getpid() in _ancestors(pid, parents):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield pid, words.strip()[:200] or "a zombie"


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


def _outside(tag: str) -> list[Path]:
    return [path for place in OUTSIDE if place.is_dir() for path in place.iterdir() if path.name.startswith(f"{tag}-")]


def _mount_points() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4].replace("\\040", " ") for line in lines]  # proc_pid_mountinfo(5)


def _loop_devices() -> Iterator[tuple[str, str]]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield f"/dev/{backing.parts[3]}", backing.read_text().strip()


def _is_below(path: str, places: Sequence[Path]) -> bool:
    return any(Path(path).is_relative_to(place) for place in places)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _pause() -> None:
    """Let others run for a moment; a signal ends the pause."""
    signal.sigtimedwait([], LOOK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
