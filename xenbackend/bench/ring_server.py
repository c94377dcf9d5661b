"""Starts and ends the backend in C for one ring of the rig, `bench/c/ring_server.c`.

Must not serve anything but a bench's own guest and its bench file: the program was written to show a limit.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from xenbackend.bench.server import Server
from xenbackend.bench.worker import POLL_US
from xenbackend.protocol.messages import Connect
from xenbackend.rig.wire import Connection

_READY = "serving"  # the program writes this when it begins to serve


class RingServer:
    """One running server.

    Raises: BenchError, with the program's own message if it does not start; KernelError if the rig refuses.
    """

    def __init__(
        self, program: Path, rig: Path, domid: int, agreed: Connect, file: Path, *, direct: bool, cpu: int | None
    ) -> None:
        """Serve the only ring of domain `domid` of the rig, with the parameters `agreed`, from `file`."""
        self._undo = ExitStack()
        log = rig / f"ring-server-{domid}.log"
        try:
            connection = Connection(rig)
            self._undo.callback(connection.close)
            ring = agreed.rings[0]
            opened, (memory, grants) = connection.call("open", domid=domid)
            _, (incoming, outgoing) = connection.call("bind", domid=domid, port=ring.event_channel)
            theirs, alive = os.pipe()
            self._alive = self._undo.enter_context(os.fdopen(alive, "wb"))  # its end ends the server, too
            inherited = (memory, grants, incoming, outgoing, theirs)
            numbers = (memory, opened["pages"], grants, *ring.grefs, incoming, outgoing, theirs)
            switches = (int(agreed.persistent), int(direct), POLL_US)
            arguments = [str(program), *map(str, (*numbers, *switches)), str(file)]
            try:
                self.server = Server("C limit", arguments, log, cpu=cpu, keep=inherited)
            finally:
                for descriptor in inherited:
                    os.close(descriptor)
            self._undo.callback(self.server.close)
            self.server.connect(lambda: _look_for_start(log))
        except BaseException:
            self._undo.close()
            raise

    def close(self) -> None:
        """End the server, and release its end of the event channel."""
        self._undo.close()


def _look_for_start(log: Path) -> None:
    if _READY not in log.read_text(errors="replace"):
        raise FileNotFoundError
