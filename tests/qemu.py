"""QEMU's tools, where they are installed; a test that needs them is skipped elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest


def qemu_img(*arguments: str | Path, may_fail: bool = False) -> str:
    """Run qemu-img and return what it says."""
    return _run("qemu-img", *arguments, may_fail=may_fail)


def qemu_io(path: Path, image_format: str, *commands: str) -> None:
    """Run commands of qemu-io on an image."""
    _run("qemu-io", "-f", image_format, *(word for each in commands for word in ("-c", each)), path)


def check(path: Path) -> tuple[int, int]:
    """Return how many errors and leaks qemu-img finds in a QCOW2 image."""
    found = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path, may_fail=True))
    return found.get("corruptions", 0) + found["check-errors"], found.get("leaks", 0)


def _run(tool: str, *arguments: str | Path, may_fail: bool = False) -> str:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed (Debian: qemu-utils)")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert may_fail or done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout
