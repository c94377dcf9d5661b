"""What a process is to those below it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The shell in between ends first; then its child does, with status 7.
_PROGRAM = """
import os, subprocess
from xenbackend.kernel.process import adopt_orphans
{adopt}
near, far = os.pipe()
script = f"(read line; exit 7) <&{{near}} >&- & echo $!"
orphan = int(subprocess.run(["sh", "-c", script], pass_fds=[near], stdout=subprocess.PIPE, check=True).stdout)
os.close(far)
try:
    print(os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]))
except ChildProcessError:
    print("another's")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("adopt", "said"), [("adopt_orphans()", "7"), ("", "another's")])
def test_orphans_come_to_who_adopts_them(adopt: str, said: str) -> None:
    """Who adopts orphans waits for a grandchild whose parent has ended; who does not knows nothing of it."""
    program = [sys.executable, "-c", _PROGRAM.format(adopt=adopt)]

    assert said == subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
