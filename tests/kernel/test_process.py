"""What a process is to those below it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The shell in between ends first; then its child does, with status 7.
_PROGRAM = """
import os, subprocess
from xenbackend.kernel.process import adopting_orphans
near, far = os.pipe()
script = f"(read line; exit 7) <&{near} >&- & echo $!"
def outlive():
    return int(subprocess.run(["sh", "-c", script], pass_fds=[near], stdout=subprocess.PIPE, check=True).stdout)
with adopting_orphans():
    ours = outlive()
theirs = outlive()
os.close(far)
for orphan in (ours, theirs):
    try:
        print(os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]))
    except ChildProcessError:
        print("another's")
"""


@pytest.mark.slow
def test_orphans_come_to_who_adopts_them() -> None:
    """Who adopts orphans waits for a grandchild whose parent has ended; who does not any more knows nothing of it."""
    said = subprocess.run([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, text=True, check=True).stdout

    assert ["7", "another's"] == said.split("\n")[:2]
