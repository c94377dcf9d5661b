"""What is imported before a worker reads its first message."""

from __future__ import annotations

import subprocess
import sys

from xenbackend.block.drivers import BUILT_IN

PROGRAM = """
import sys
from xenbackend.worker.preload import preload
preload("xenbackend.rig.host")
from xenbackend.worker import main
print("\\n".join(sys.modules))
"""


def test_all_that_is_built_in_is_there() -> None:
    """Drivers, the host, the codecs of names in images, and what error sentences need are imported."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines())

    assert set() == {each.partition(":")[0] for each in BUILT_IN.values()} - loaded
    assert {"xenbackend.rig.host", "xenbackend.worker.io_queue", "encodings.utf_16_be", "shlex", "difflib"} <= loaded
