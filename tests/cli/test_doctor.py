"""`xenbackend doctor` where nothing answers; tests/system/test_doctor.py has a whole host."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend.cli.doctor import EXIT_STATUS
from xenbackend.doctor.finding import Verdict


def test_what_could_not_be_looked_at_is_no_success() -> None:
    """Each verdict has its own exit status, and an unknown one is not 0."""
    assert {Verdict.OK: 0, Verdict.WRONG: 1, Verdict.UNKNOWN: 3} == EXIT_STATUS


def without_counts(text: str) -> str:
    """Return a text without its numbers, since the host's count of open files changes."""
    return re.sub(r"\d+", "N", text)


@pytest.mark.slow
def test_the_text_agrees_with_the_json(tmp_path: Path) -> None:
    """Text and JSON have the same findings and exit status; no service is needed, and a broken setting is a finding."""
    config = tmp_path / "x.toml"
    config.write_text("poll_us = 5000\n")
    words = [sys.executable, "-m", "xenbackend", "doctor", "5/xvda", "--all", "--config", str(config), "--store",
             str(tmp_path / "store"), "--socket", str(tmp_path / "none")]  # fmt: skip
    shown, told = (
        subprocess.run([*words, *more], capture_output=True, text=True, timeout=60, check=False)
        for more in ([], ["--json"])
    )
    values = json.loads(told.stdout)

    assert (1, 1, "wrong", "") == (shown.returncode, told.returncode, values["verdict"], shown.stderr)
    assert any(each["check"] == "settings" and "poll_us is 5000" in each["sentence"] for each in values["findings"])
    lines = [without_counts(line) for line in shown.stdout.splitlines()]
    for each in values["findings"]:
        about = f"{each['disk']} {each['check']}".strip()
        sentence = without_counts(f"  {about}: {each['sentence']}")
        assert any(line.startswith(each["verdict"]) and sentence in line for line in lines), each
        assert not each["command"] or without_counts(f"         -> {each['command']}") in lines
