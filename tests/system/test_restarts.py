"""A restart of the service while a toolstack waits for a disk, whose storage does not answer until the test wants it.

Machine, service, workers, the hotplug script and the command line are real, and so is the file system.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import fuse
from tests.supervisor.helpers import write_like_libxl
from tests.until import until
from xenbackend.embedded.machine import Machine
from xenbackend.host import block_xenbackend
from xenbackend.protocol.codes import Code
from xenbackend.rig.frontend import Wishes
from xenbackend.settings_file import PATH as SETTINGS
from xenbackend.supervisor.xenstore.paths import VbdPath

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fuse.IS_POSSIBLE, reason="no /dev/fuse for us, so no storage that hangs"),
]
BY_XL, BY_HAND = VbdPath("vbd", 0, 5, 51712), VbdPath("vbd", 0, 5, 51728)
DATA = b"d" * 4096


class Waiting:
    """A machine with a guest for which xl and `xenbackend attach` wait: their disks' storage does not answer."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.server = stack.enter_context(fuse.served(home / "remote", {"a.img": 1 << 20, "b.img": 1 << 20}))
        self.machine = stack.enter_context(Machine())
        stack.callback(self.server.release)
        self.guest = self.machine.create_guest(5)
        stack.callback(self.guest.close)
        self.server.hold(fuse.OPEN)
        chains = [f"aio:{home}/remote/{name}.img" for name in "ab"]
        write_like_libxl(self.machine.store, BY_XL, params=chains[0])
        until(lambda: self.machine.store.read(f"{BY_XL.backend}/state") == "2")
        self.script = self._begin([sys.executable, "-IS", str(self._script(home)), "add"], stack)
        where = ["--socket", self.machine.control, "--store", self.machine.xenstored.address]
        self.attach = self._begin([sys.executable, "-m", "xenbackend", "attach", "5/xvdb", chains[1], *where], stack)
        until(lambda: self.orders() == [("attach", Code.UNDER_WAY)])
        until(lambda: self._clients() == 2)
        for _ in range(2):  # what it was asked before is being done once it answers
            self.machine.ask({"verb": "ping"})

    def _script(self, home: Path) -> Path:
        settings, script = home / "settings.toml", home / "block-xenbackend"
        settings.write_text(f'socket = "{self.machine.control}"\n')
        text = Path(block_xenbackend.__file__).read_text()
        script.write_text(text.replace(f'SETTINGS = "{SETTINGS}"', f'SETTINGS = "{settings}"'))
        return script

    def _begin(self, command: list[str], stack: ExitStack) -> subprocess.Popen[str]:
        address = self.machine.xenstored.address
        environment = {**os.environ, "XENBUS_PATH": BY_XL.backend, "XENSTORED_PATH": address}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stack.callback(process.communicate)
        stack.callback(process.kill)
        return process

    def _clients(self) -> int:
        """Return how many clients are connected to the control socket."""
        lines = Path("/proc/net/unix").read_text().splitlines()
        return sum(line.endswith(f" {self.machine.control}") and line.split()[5] == "03" for line in lines)

    def orders(self) -> list[tuple[str, Code]]:
        """Return the orders of the ledger, and how they ended."""
        found = self.machine.ask({"verb": "orders"})["data"]
        return [(each["verb"], Code(each["code"])) for each in found]

    def ends(self) -> list[tuple[int, str]]:
        """Return how script and command end."""
        said = [(each.communicate(timeout=60)[1], each.returncode) for each in (self.script, self.attach)]
        return [(status, text) for text, status in said]


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    """Such a machine."""
    with ExitStack() as stack:
        yield Waiting(tmp_path, stack)


@pytest.mark.parametrize("how", ["replaced", "killed"])
def test_whoever_waits_for_a_disk_gets_it_from_the_next_service(waiting: Waiting, how: str) -> None:
    """If the service is replaced or killed while a hotplug script and `xenbackend attach` wait, both go on waiting, and
    succeed once the next service has opened their chains. The ledger has one order.
    """
    machine = waiting.machine
    former = machine.service_pid
    if how == "replaced":
        machine.replace_service()
    else:
        os.kill(former, signal.SIGKILL)
    until(lambda: Path(f"/proc/{former}").exists() is False)
    until(lambda: machine.service_pid != former)
    until(lambda: len(machine.ask({"verb": "status"})["data"]) == 2)
    still = [each.poll() for each in (waiting.script, waiting.attach)]
    waiting.server.release()
    ends = waiting.ends()
    machine.store.write(f"{BY_XL.frontend}/state", "1")
    contents = []
    for path in (BY_XL, BY_HAND):
        disk = waiting.guest.connect(path, Wishes())
        disk.write(0, DATA)
        contents.append(disk.read(0, 8))
        disk.close()

    assert ([None, None], [(0, ""), (0, "")]) == (still, ends)
    assert [DATA, DATA] == contents
    assert [("attach", Code.OK)] == waiting.orders()


def test_whoever_waits_for_a_disk_is_told_that_nobody_will_serve_it(waiting: Waiting) -> None:
    """A service that stops for good tells those that wait for a disk, because no other service would."""
    waiting.machine.stop_service()

    ends = waiting.ends()
    assert [1, 1] == [status for status, _ in ends]
    assert ["the service is stopping"] * 2 == [text.strip().rpartition(": ")[2] for _, text in ends]
