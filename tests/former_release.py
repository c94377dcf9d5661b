"""The last release, from the repository: its program, as a host has it before this one is installed over it.

Must not import the program: it runs as processes of its own.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

COMMIT = "af78c78"
VERSION = "0.1.0"  # of that commit
ROOT = Path(__file__).parents[1]
PATIENCE_S = 20.0


def unpack(directory: Path) -> Path:
    """Unpack the last release's program into a directory, and return that."""
    archive = subprocess.run(["git", "archive", COMMIT, "xenbackend"], check=True, capture_output=True, cwd=ROOT).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")
    return directory


class Site:
    """A directory to import the program from; one version atomically replaces another one, as a package does.

    environment   of processes that are to import the program from there
    """

    def __init__(self, directory: Path, program: Path) -> None:
        """Begin with the program in `program`."""
        directory.mkdir()
        self._place = directory / "xenbackend"
        self.environment = {"PYTHONPATH": str(directory), "PYTHONSAFEPATH": "1"}
        self.install(program)

    def install(self, program: Path) -> None:
        """Replace the version that is there by another one."""
        fresh = self._place.with_name("fresh")
        fresh.symlink_to(program / "xenbackend")
        fresh.replace(self._place)

    def run(self, *arguments: str) -> None:
        """Run a command of the installed program."""
        command = [sys.executable, "-m", "xenbackend", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **self.environment}, capture_output=True)


def ask(control: str, request: dict[str, Any]) -> Any:
    """Ask a service of any version, and return the data of its answer; None if it has none, or nobody answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as near:
        near.settimeout(PATIENCE_S)
        try:
            near.connect(control)
            near.sendall(json.dumps(request).encode() + b"\n")
            with near.makefile("rb") as stream:
                return json.loads(stream.readline() or b"{}").get("data")
        except OSError:
            return None


def wait_for_end(pidfd: int) -> None:
    """Wait until a process has ended."""
    assert select.select([pidfd], [], [], PATIENCE_S)[0]
