"""`python -m tests.scoreboard.branches`: the share of branches of ring, journal and formats that their tests take.

Must not say what is enough: the scoreboard has the goal. It prints what was not taken, file by file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.scoreboard.measures import BUILD
from tests.stamp import stamp

WHAT = ("xenbackend/blkif/*.py", "xenbackend/journal.py", "xenbackend/block/formats/*.py")
TESTS = (
    "tests/blkif", "tests/test_journal.py", "tests/block/formats", "tests/block/qcow", "tests/worker/test_queue.py",
    "tests/worker/test_recovery.py", "tests/worker/test_connection.py",
)  # fmt: skip


def main() -> int:
    """Run the tests, and leave build/branches.json; return what pytest returned."""
    with tempfile.TemporaryDirectory() as directory:
        data, report = Path(directory) / "data", Path(directory) / "report.json"
        coverage = [sys.executable, "-m", "coverage"]
        run = [*coverage, "run", "--branch", f"--data-file={data}", f"--include={','.join(WHAT)}", "-m", "pytest"]
        code = subprocess.run([*run, "-q", "-p", "no:cacheprovider", *TESTS], check=False).returncode
        if code:
            return code
        subprocess.run([*coverage, "json", "-q", f"--data-file={data}", "-o", report], check=True)
        found = json.loads(report.read_text())
    for name, each in found["files"].items():
        for begin, end in each["missing_branches"]:
            print(f"{name}:{begin} never goes on {'to the end' if end < 0 else f'at {end}'}")
    totals = found["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"{totals['covered_branches']} of {totals['num_branches']} branches: {percent:.1f} %")
    BUILD.mkdir(exist_ok=True)
    (BUILD / "branches.json").write_text(json.dumps({"percent": percent, **stamp()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
