"""The service as `python -m xenbackend`, except that its workers are `wild_worker`, and that it counts their messages.

Must not change anything else of the service, except that a worker that hangs up has less time to end.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.supervisor.wild_worker import ENVIRONMENT, HEARD, Words
from xenbackend.cli.main import main
from xenbackend.protocol import codec
from xenbackend.supervisor.service import fleet, parent, process, zygote

_WORKER = (sys.executable, "-m", "tests.supervisor.wild_worker")
_ZYGOTE = (
    sys.executable,
    "-c",
    "import sys; from tests.supervisor.wild_worker import be_zygote; sys.exit(be_zygote(sys.argv[1:]))",
)


def _count(words: Words) -> None:
    decode = codec.from_worker

    def from_worker(datagram: bytes) -> Any:
        words.words[HEARD] += 1
        return decode(datagram)

    codec.from_worker = from_worker


def _parent(command: list[str], *rest: Any) -> parent.Parent:
    """Return a parent that restarts this program instead of the real one."""
    return _Parent([sys.executable, "-m", "tests.supervisor.wild_service", *command[3:]], *rest)


if __name__ == "__main__":
    _count(Words(os.environ[ENVIRONMENT]))
    _Parent, parent.Parent = parent.Parent, _parent
    zygote.COMMAND = _ZYGOTE
    fleet.COMMAND = _WORKER
    process._TOLD = {*process._TOLD, ENVIRONMENT}
    fleet.HANG_UP_S = 0.3
    sys.exit(main(sys.argv[1:]))
