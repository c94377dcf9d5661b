"""The sending side of a migration onto the same host, played by hand: what `xl migrate` says to `xl migrate-receive`.

Must not resume or destroy the guest that is sent: that is what the tests are about.

`xl migrate` itself has to be told which pages a guest writes while it is carried, and for a PV guest the hypervisor
knows that by shadow paging only, which Debian's is built without (CONFIG_SHADOW_PAGING). The receiver does not see the
difference to a guest that is paused and carried as it is. Source of the messages: Xen, tools/xl/xl_migrate.c.
"""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path
from types import TracebackType

from tests.xen.tools.command import POLL_S, TIMEOUT_S, Failed, until, xl
from tests.xen.tools.guest import Guest
from tests.xen.tools.idle import Patience

BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0"
INCOMING = "--incoming"  # the end of the name of what was received, until it runs


class Receiver:
    """`xl migrate-receive`, which ends with the block."""

    def __init__(self) -> None:
        self.said = b""
        self._xl = subprocess.Popen(
            ["xl", "migrate-receive", "-e"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def send(self, guest: Guest, file: Path) -> None:
        """Carry a guest over, by way of a file, and leave it paused; what comes out waits for permission to run."""
        xl("save", "-p", guest.domid, file)
        self._wait_for(BANNER)
        subprocess.run(["cat", str(file)], stdout=self._xl.stdin, check=True)
        self._wait_for(READY)

    def let_it_run(self) -> None:
        """Give the permission, and return when it runs under the name of the guest that was sent. Raises: Failed."""
        self._xl.stdin.write(GO)
        self._wait_for(REPORT)
        status = os.read(self._xl.stdout.fileno(), 1)
        if status != b"\0":
            raise Failed(f"the receiver could not let the guest run: {status!r}")

    def hang_up(self) -> None:
        """Break the connection, and return when the receiver has ended."""
        self._xl.stdin.close()
        until("the receiver has ended", lambda: self._xl.poll() is not None)

    def kill(self) -> None:
        """End the receiver without a chance to clean up."""
        self._xl.kill()
        self._xl.wait()
        self._xl.stdin.close()
        self._xl.stdout.close()

    def _wait_for(self, message: bytes) -> None:
        patience = Patience()
        while not self.said.endswith(message):
            if not select.select([self._xl.stdout], [], [], POLL_S)[0]:
                if patience.spent_s() > TIMEOUT_S:
                    raise Failed(f"the receiver did not say {message!r}, only {self.said!r}")
                continue
            character = os.read(self._xl.stdout.fileno(), 1)
            if not character:
                raise Failed(f"the receiver ended after {self.said!r} without {message!r}")
            self.said += character
