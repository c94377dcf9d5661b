"""Every suite at length, step by step: what has passed with this code is not run again, and a report says what was run.

Must not use a result of other code: code is identified by the content of all files except the documentation.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tests.ci import table
from tests.ci.runner import Runner
from tests.ci.share import fill
from tests.ci.steps import STEPS, Step
from tests.ci.table import Row

PLACE = Path("build/all")
REPORT = PLACE / "report.txt"


def run(runner: Runner, commit: str, *, anew: bool = False, place: Path = PLACE, steps: Sequence[Step] = STEPS) -> int:
    """Run what has not passed yet, write the report, and return the exit status.

    The other steps are run even if one fails: they take hours, and each tells something else.
    """
    place.mkdir(parents=True, exist_ok=True)
    code, rows = code_now(), []
    for step in (step for step in steps if step.full):
        result = place / f"{step.name}.json"
        row = None if anew else _former(result, code)
        if row is None:
            row = _run(runner, step, commit)
            if code_now() != code:  # edited meanwhile: neither version was tested
                row = replace(row, outcome="changed")
            result.write_text(json.dumps({"code": code, **asdict(row)}))
        rows.append(row)
        _write(place, commit, code, rows)
    print(f"\n{(place / REPORT.name).read_text()}", flush=True)
    return int(any(row.outcome != "ok" for row in rows))


def code_now() -> str:
    """Return what identifies the program and its tests: a hash of the files in the work tree, without *.md."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], check=True, capture_output=True
    ).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted(each.decode() for each in files if each and not each.endswith(b".md")):
        content = Path(name).read_bytes() if Path(name).is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _former(result: Path, code: str) -> Row | None:
    """Return the row of a step that has passed with the same code; None if it has not."""
    try:
        known = json.loads(result.read_text())
    except (OSError, ValueError):
        return None
    if known.pop("code", None) != code or known["outcome"] != "ok":
        return None
    return Row(**known)


def _run(runner: Runner, step: Step, commit: str) -> Row:
    command = fill(step.full, step, commit)
    print(f"\n== {step.name}: {command}", flush=True)
    ran = runner.run(command)
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return Row(step.name, "failed" if ran.status else "ok", ran.seconds, remark=f"{when}  {command}")


def _write(place: Path, commit: str, code: str, rows: list[Row]) -> None:
    head = f"make test-all at {commit[:10]} (code {code}), times UTC"
    (place / REPORT.name).write_text(f"{head}\n{table.text(rows)}\n")
