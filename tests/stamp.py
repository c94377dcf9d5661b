"""The date and commit that every file of figures in build/ has.

Must not fail without git: the commit is empty then.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from functools import cache


def stamp() -> dict[str, str]:
    """Return `date` and `commit`, which ends with a plus sign if the work tree differs from it."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit()}


@cache
def _commit() -> str:
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+" if commit and _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
