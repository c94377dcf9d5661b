"""Whether a registry would accept a release's archives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.test_release import ROOT, build


def test_a_registry_would_take_them(tmp_path: Path) -> None:
    """`twine check --strict` accepts the sdist and the wheel."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv/bin"
    subprocess.run([bin_ / "pip", "install", "--quiet", "--disable-pip-version-check", "twine>=6,<8"], check=True)
    said = subprocess.run(
        [bin_ / "twine", "check", "--strict", *build(ROOT, tmp_path / "dist")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == said.returncode, said.stdout
    assert 2 == said.stdout.count("PASSED")
