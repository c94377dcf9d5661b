"""`python -m tests.engines.pauses`: how long a guest waits for its next answer after a kill, below each engine.

Must not load the host: there is one guest with one request at a time, and a worker lives long enough between two kills
that its successor follows at once. What kills cost under load is measured by chaos.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tests.chaos.engines import GOALS_MS
from tests.engines.ceph import Ceph
from tests.engines.servers import Engine
from tests.stamp import stamp
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Frontend, Wishes

SIZE = 16 << 20
LIFE_S = 1.5  # of a worker: more than a hasty death's wait (`supervisor.vbd.backoff`)
DATA = os.urandom(4096)
PROGRAMS = {"nbdkit": "nbdkit", "rbd": "ceph-osd"}


@contextmanager
def _nbdkit(directory: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    with Engine("nbdkit", directory, SIZE, has_socket_unit=True) as engine:

        def restart() -> None:
            if not engine.is_alive():  # nbdkit 1.32 aborts if a client dies with a request open
                engine.start()

        yield engine.chain, restart


@contextmanager
def _rbd(directory: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    with Ceph(directory) as ceph:
        yield ceph.create("guest", f"{SIZE}B"), lambda: None


ENGINES = {"nbdkit": _nbdkit, "rbd": _rbd}


def measure(engine: str, kills: int, console: Console) -> list[float]:
    """Return the waits in ms, sorted."""
    waits = []
    with (
        tempfile.TemporaryDirectory(prefix="pauses-", dir="/dev/shm") as place,
        ENGINES[engine](Path(place)) as (chain, restart),
        Machine(log=Path(place) / "service.log") as machine,
        closing(machine.create_guest(5)) as guest,
    ):
        path = machine.attach(guest.domid, "xvda", chain)
        frontend = guest.connect(path, Wishes())
        for _ in track(range(kills), engine, console=console):
            _work(frontend)
            [disk] = machine.ask({"verb": "status", "vbd": path.disk})["data"]
            os.kill(disk["worker"], signal.SIGKILL)
            began = time.monotonic()
            restart()
            frontend.write(0, DATA)
            waits.append((time.monotonic() - began) * 1000)
        frontend.close()
    return sorted(waits)


def _work(frontend: Frontend) -> None:
    give_up = time.monotonic() + LIFE_S
    sector = 0
    while time.monotonic() < give_up:
        frontend.write(sector, DATA)
        sector = (sector + 8) % (SIZE // 512)


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return 1 if the slowest of a hundred is above an engine's goal."""
    parser = argparse.ArgumentParser(prog="tests.engines.pauses", description=main.__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("engines", nargs="*", default=[*ENGINES], metavar="ENGINE", help="nbdkit, rbd; default: both")
    args = parser.parse_args(argv)
    console = Console()
    figures, is_above = {}, False
    for engine in args.engines:
        if shutil.which(PROGRAMS[engine]) is None:
            console.print(f"skipped: there is no {PROGRAMS[engine]} here")
            continue
        waits = measure(engine, args.kills, console)
        middle, slow = (waits[int(len(waits) * part)] for part in (0.5, 0.99))
        goal = GOALS_MS[engine]
        is_above |= slow > goal
        console.print(
            f"{engine}: {len(waits)} kills; next answer after {middle:.0f} ms (99 %: {slow:.0f}, goal {goal}; longest "
            f"{waits[-1]:.0f})",
            highlight=False,
        )
        figures[engine] = {"kills": len(waits), "median": middle, "99 %": slow, "goal": goal}
    if args.json:
        args.json.write_text(json.dumps({**figures, **stamp()}, indent=1) + "\n")
    return 1 if is_above else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
