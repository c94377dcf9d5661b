"""The commands of README.md and docs/ are run in order, page by page, in a shell on a simulated host."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tests import pages
from tests.qemu import qemu_img
from xenbackend.embedded.machine import GuestDomain, Machine
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.xl.config import read_disks
from xenbackend.xl.disk import rewrite
from xenbackend.xl.host import EVERY_XEN

pytestmark = pytest.mark.slow
DOMID, NAME, MIB = 5, "guest", 2048  # sectors
CONFIGURATION = "name = 'guest'\ndisk = ['tap2:log:|aio:/img/guest.raw,xvda,w']\n"
WITH_COMMANDS = [page for page in pages.PAGES if pages.commands(page)]
PROGRAM = """\
#!/bin/sh
socket="--socket {socket}"
case "$1 $2" in
    attach*|detach*) exec {python} -m xenbackend "$@" $socket --store {store} ;;
    "log show") ;;
    status*|top*|latency*|doctor*|report*|metrics*|orders*|set*|snapshot*|resize*|pause*|resume*|policy*|upgrade*|log*)
        exec {python} -m xenbackend "$@" $socket ;;
esac
exec {python} -m xenbackend "$@"
"""


class Host:
    """A simulated host with the pages' files, `xenbackend` on its PATH, and a guest once a page needs one."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine, self._directory = machine, directory
        self._guest: GuestDomain | None = None
        self._disks: dict[str, tuple[VbdPath, Frontend]] = {}
        for name in ("img", "backup", "bin"):
            (directory / name).mkdir()
        (directory / ".venv").mkdir()
        (directory / ".venv/bin").symlink_to(directory / "bin")  # where `make run` puts it
        for name in ("guest.raw", "more.raw", "data.raw", "try.raw"):
            with (directory / "img" / name).open("wb") as file:
                file.truncate(64 << 20)
        raw = directory / "a.raw"
        raw.write_bytes(Random(1).randbytes(1 << 20).ljust(8 << 20, b"\0"))
        for name in ("a.qcow2", "disk.vmdk"):
            qemu_img("convert", "-O", name.rpartition(".")[2], raw, directory / name)
        (directory / "vm.cfg").write_text(self._here(CONFIGURATION))
        program = directory / "bin" / "xenbackend"
        store = machine.directory / "xenstore.sock"
        program.write_text(PROGRAM.format(python=sys.executable, socket=machine.control, store=store))
        program.chmod(0o755)

    def do(self, line: str) -> None:
        """Run a line of a page, after creating a guest if the line needs one."""
        if self._guest is None and re.search(rf"\b({NAME}|{DOMID})(/| |$)", line.replace("xl create", "")):
            self._create()
        if line.startswith(pages.TOOLSTACK):
            self._toolstack(line)
        else:
            self._shell(line)
            if line.startswith("dd "):  # the guest goes on writing while its disk is copied
                self._write(48)

    def close(self) -> None:
        """End the guest."""
        if self._guest is not None:
            for vdev in list(self._disks):
                self._detach(vdev)
            self._guest.close()
            self._guest = None

    def _shell(self, line: str) -> None:
        path = f"{self._directory}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        result = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", self._here(line)],
            cwd=self._directory,
            env={"PATH": path, "PYTHONPATH": str(pages.ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert 0 == result.returncode, f"{line}\n{result.stdout}{result.stderr}"

    def _here(self, text: str) -> str:
        return re.sub(r"(?<![\w/])/(img|backup)/", rf"{self._directory}/\1/", text)

    def _toolstack(self, line: str) -> None:
        _, command, *words = shlex.split(line)
        if command == "create":
            self.close()
            self._create()
        elif command == "shutdown":
            self.close()
        elif command == "block-attach":
            self._attach(self._here(words[1]))
        else:
            self._detach(words[1])

    def _create(self) -> None:
        self._guest = self._machine.create_guest(DOMID)
        self._machine.store.write(f"/local/domain/{DOMID}/name", NAME)
        text = (self._directory / "vm.cfg").read_text()
        for disk in read_disks(text, "vm.cfg"):
            self._attach(rewrite(disk.value, EVERY_XEN) or disk.value)
        self._write(4)

    def _attach(self, line: str) -> None:
        options, _, chain = line.partition("target=")
        vdev = dict(each.split("=") for each in options.strip(",").split(","))["vdev"]
        assert self._guest is not None
        path = self._machine.attach(DOMID, vdev, chain)
        self._disks[vdev] = path, self._guest.connect(path, Wishes())

    def _detach(self, vdev: str) -> None:
        path, frontend = self._disks.pop(vdev)
        frontend.close()
        self._machine.detach(path)

    def _write(self, at_mib: int) -> None:
        for _, frontend in self._disks.values():
            frontend.write(at_mib * MIB, b"what the guest wrote".ljust(4096, b"."))
            frontend.flush()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with its own directory for /img and /backup."""
    with ExitStack() as stack:
        machine = stack.enter_context(Machine())
        host = Host(machine, tmp_path)
        stack.callback(host.close)
        yield host


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.relative_to(pages.ROOT).as_posix())
def test_the_commands_of_a_page_do_what_they_say(page: Path, host: Host) -> None:
    """Each command of a page ends with status 0, in order, except those for which `NOT_RUN` gives a reason.

    The simulated toolstack does what xl would do with a disk.
    """
    for line in pages.commands(page):
        if not pages.why_not_run(line):
            host.do(line)
