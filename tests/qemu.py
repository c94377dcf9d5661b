"""QEMU's tools; a test that needs them is skipped if they are not installed."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def qemu_img(*arguments: str | Path, may_fail: bool = False) -> str:
    """Run qemu-img and return what it says."""
    return _run("qemu-img", *arguments, may_fail=may_fail)


def qemu_io(path: Path, image_format: str, *commands: str) -> None:
    """Run commands of qemu-io on an image."""
    _run("qemu-io", "-f", image_format, *(word for each in commands for word in ("-c", each)), path)


def refusal(tool: str, *arguments: str | Path) -> str:
    """Run one of the tools; return what it prints if it fails, and an empty text if it succeeds."""
    _need(tool)
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False, input="")
    said = done.stderr + done.stdout
    return said if done.returncode or "can't open" in said else ""  # qemu-io's status does not always tell


@contextmanager
def held_open(image_format: str, path: Path, *options: str) -> Iterator[int]:
    """Keep an image open in a qemu-io with these options, by default for writing; yield its process id."""
    _need("qemu-io")
    command = ["qemu-io", *options, "-f", image_format, path]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("length\n")
        process.stdin.flush()
        said = process.stdout.readline()  # which it says once the image is open
        assert "iB" in said or "bytes" in said, said
        try:
            yield process.pid
        finally:
            process.stdin.close()


@contextmanager
def daemon(tool: str, pid_file: Path, *arguments: str | Path) -> Iterator[int]:
    """Run qemu-nbd or qemu-storage-daemon; yield its process id once it has opened everything."""
    _need(tool)
    words = {"qemu-nbd": ["--fork", "--pid-file"], "qemu-storage-daemon": ["--daemonize", "--pidfile"]}[tool]
    subprocess.run([tool, *words, pid_file, *arguments], check=True, stdout=-3, stderr=-3)
    pid = int(pid_file.read_text())
    pidfd = os.pidfd_open(pid)
    try:
        yield pid
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # qemu-nbd misses a SIGTERM that comes early
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)


def check(path: Path) -> tuple[int, int]:
    """Return how many errors and leaks qemu-img finds in a QCOW2 image."""
    found = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path, may_fail=True))
    return found.get("corruptions", 0) + found["check-errors"], found.get("leaks", 0)


def _run(tool: str, *arguments: str | Path, may_fail: bool = False) -> str:
    _need(tool)
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert may_fail or done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


def _need(tool: str) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed (Debian: qemu-utils, qemu-system-common)")
