"""Figures that tests leave for the scoreboard: a file for each test, below the directory that FIGURES names.

Must not leave anything if FIGURES is not set. When a test begins, its former figures are removed: a test that fails has
none.

    build/figures/SUITE/MEASURE/TEST.json     {"value": …, "date": …, "commit": …}
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tests.stamp import stamp

_LONGEST = 200  # characters of a file's name
_left: dict[Path, float] = {}  # by this process


def begin(test: str) -> None:
    """Remove the figures that a test has left."""
    if root := _root():
        for path in root.glob(f"*/{_name(test)}"):
            path.unlink()
            _left.pop(path, None)


def add(measure: str, value: float) -> None:
    """Leave a figure of the running test, or add to the one that it has left since it began."""
    root = _root()
    if not root:
        return
    path = root / re.sub(r"\W+", "-", measure) / _name(os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0])
    _left[path] = _left.get(path, 0) + value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"value": _left[path], **stamp()}) + "\n")


def _root() -> Path | None:
    root = os.environ.get("FIGURES")
    return Path(root) if root else None


def _name(test: str) -> str:
    return re.sub(r"\W+", "-", test)[-_LONGEST:] + ".json"
