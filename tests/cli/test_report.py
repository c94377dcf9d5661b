"""`xenbackend report` on the command line; tests/system/test_report.py looks for secrets in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_json import documented, keys


@pytest.mark.slow
def test_it_says_what_it_has_written(tmp_path: Path) -> None:
    """Without --output the file is named after the host and the time; an existing file is not overwritten."""
    words = [sys.executable, "-m", "xenbackend", "report", "--socket", str(tmp_path / "none"), "--store",
             str(tmp_path / "store")]  # fmt: skip
    named = ["--json", "--output", str(tmp_path / "r.tar.gz")]
    done, told, again = (
        subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        for more in ([], named, named)
    )
    values = json.loads(told.stdout)
    written = sorted(each.name for each in tmp_path.iterdir())

    assert (0, 0, 2) == (done.returncode, told.returncode, again.returncode)
    assert documented("report")[0] == keys(values, set())
    assert str(tmp_path / "r.tar.gz") == values["file"]
    assert "it exists; name a new file" in again.stderr
    assert ["r.tar.gz"] == written[:1]
    assert re.fullmatch(r"xenbackend-report-\S+-\d{8}T\d{6}Z\.tar\.gz", written[1])
    assert f"{tmp_path}/{written[1]}: look through it before you send it" in done.stdout
    assert "version.txt: " in done.stdout
