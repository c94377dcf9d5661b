"""The systemd unit gives up everything that a service which opens any image can do without."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "xenbackend.service"
MOST = 40  # in tenths, by systemd's measure of exposure


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_what_systemd_still_counts_is_explained(tmp_path: Path) -> None:
    """The exposure is at most 4.0, and each remaining row has a reason in the unit."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/xenbackend", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST}", "--no-pager", str(unit)],
        capture_output=True, text=True, check=False, env={"SYSTEMD_COLORS": "0", "LANG": "C.UTF-8"},
    )  # fmt: skip

    assert 0 == done.returncode, done.stdout[-200:] + done.stderr
    reasons = UNIT.read_text().partition("still counts, and why it stays:")[2].partition("[Install]")[0]
    left = re.findall(r"^✗ (\S+)", done.stdout, re.MULTILINE)
    assert len(left) > 10
    for row in left:
        name, _, value = row.partition("=")
        word = value.removeprefix("~") if name in ("CapabilityBoundingSet", "SystemCallFilter") else name
        word = value.removeprefix("~") if name == "RestrictAddressFamilies" else word.partition("/")[0]
        assert word in reasons, row
