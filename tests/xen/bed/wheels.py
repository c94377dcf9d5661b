"""Python packages for dom0: what the project and its suite there need, and the project itself.

Must not be used inside dom0, which has no network.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[3]


def requirements() -> list[str]:
    """Return the project's dependencies and pytest, in pip's notation."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    pytest = [each for each in project["optional-dependencies"]["dev"] if re.match(r"pytest\b(?!-)", each)]
    return [*project["dependencies"], *pytest]


def fetch(directory: Path) -> None:
    """Put the wheels of all requirements into a directory. Raises: CalledProcessError."""
    make(directory, *requirements())


def make(directory: Path, *what: str) -> None:
    """Put the wheels of `what`, which are arguments of pip, into a directory. Raises: CalledProcessError."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    command = [*pip, "--wheel-dir", str(directory), *what]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
