"""What is known of tests that failed once and passed again: `tests/flaky.toml`.

Must not excuse more than one in a run.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).parents[1] / "flaky.toml"
MOST = 1  # in one run


def known(file: Path = FILE) -> dict[str, str]:
    """Return what was found about each such test."""
    return {each["name"]: each["found"].strip() for each in tomllib.loads(file.read_text()).get("test", [])}


def judge(passed_again: Mapping[str, str], found: Mapping[str, str]) -> tuple[bool, list[str]]:
    """Return whether a run may pass with these tests, which come with their reasons, and lines about each."""
    lines = []
    for test, reason in passed_again.items():
        lines.append(f"failed once and passed again: {test}: {reason}")
        lines.append(f"  {found.get(test, f'it is not in {FILE.name} yet: look into it, note it there')}")
    if len(passed_again) > MOST:
        lines.append(f"{len(passed_again)} such tests in one run are more than chance: it fails")
    return len(passed_again) <= MOST, lines
