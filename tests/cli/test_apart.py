"""Commands about images on storage that does not answer, or answers with errors: real processes, a real file system."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fuse
from tests.until import until
from xenbackend.cli.apart import PATIENCE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not fuse.IS_POSSIBLE, reason="no /dev/fuse for us, so no storage that hangs"),
]
ROOT = Path(__file__).parents[2]
SIZE = 1 << 20
USUAL_S = 5.0
CONVERT_TO = ("convert", "aio:{home}/here.img", "aio:{remote}/b.img", "--overwrite")
MOMENTS = {
    "lookup": (fuse.LOOKUP, ("info", "{remote}/a.img")),
    "open": (fuse.OPEN, ("info", "{remote}/a.img")),
    "read of a header": (fuse.READ, ("check", "qcow2:{remote}/a.img")),
    "read": (fuse.READ, ("convert", "aio:{remote}/a.img", "qcow2:{home}/new.qcow2")),
    "write": (fuse.WRITE, CONVERT_TO),
    "flush": (fuse.FSYNC, CONVERT_TO),
}


class Command:
    """A running `xenbackend image …`, whose output goes to files: a pipe would be kept open by a process that hangs."""

    def __init__(self, home: Path, words: tuple[str, ...]) -> None:
        self._said = home / "said"
        given = [word.format(home=home, remote=home / "remote") for word in words]
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "xenbackend", "image", *given],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """Everything that the command has printed so far."""
        return self._said.read_text()

    def status(self, limit_s: float = 20.0) -> int:
        """Return the exit status, once the command has ended."""
        return self.process.wait(limit_s)

    def child(self) -> int:
        """Return the process that does the command's work."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[fuse.Served]:
    """A file system that may stop answering, with an image beside it."""
    (tmp_path / "here.img").write_bytes(b"x" * SIZE)
    with fuse.served(tmp_path / "remote", {"a.img": SIZE, "b.img": SIZE}) as server:
        yield server
        server.release()


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interruption_ends_it_whatever_hangs(server: fuse.Served, tmp_path: Path, moment: str) -> None:
    """Ctrl-C or `kill` soon ends the command with a sentence and status 130; the hanging process ends when it can."""
    opcode, words = MOMENTS[moment]
    server.hold(opcode)
    command = Command(tmp_path, words)
    until(server.held)
    child = command.child()
    command.process.send_signal(signal.SIGINT)
    assert 130 == command.status(PATIENCE_S + USUAL_S)

    assert re.search(
        rf"^xenbackend: ended by SIGINT: the storage.* does not answer; process {child} will end when it does$",
        command.said, re.MULTILINE,
    ), command.said  # fmt: skip
    assert Path(f"/proc/{child}").exists()
    server.release()
    until(lambda: not Path(f"/proc/{child}").exists())


def test_a_second_interruption_is_not_waited_for(server: fuse.Served, tmp_path: Path) -> None:
    """A second interruption ends the command at once, and the message names the file that is open."""
    server.hold(fuse.READ)
    command = Command(tmp_path, ("check", "qcow2:{remote}/a.img"))
    until(server.held)
    begun = time.monotonic()
    command.process.send_signal(signal.SIGINT)
    while command.process.poll() is None:
        command.process.send_signal(signal.SIGINT)
        assert time.monotonic() - begun < USUAL_S

    assert 130 == command.status()
    assert time.monotonic() - begun < PATIENCE_S
    assert f"the storage of {tmp_path}/remote/a.img does not answer" in command.said


def test_a_terminal_tells_all_processes(server: fuse.Served, tmp_path: Path) -> None:
    """If the signal reaches the working process too, the command waits a limited time for that process to end."""
    server.stop()
    command = Command(tmp_path, ("info", "{remote}/a.img"))
    until(lambda: "fuse" in _waits_in(command))
    os.killpg(command.process.pid, signal.SIGTERM)

    assert 128 + signal.SIGTERM == command.status(PATIENCE_S + USUAL_S)
    server.go_on()


def _waits_in(command: Command) -> str:
    try:
        return Path(f"/proc/{command.child()}/wchan").read_text()
    except (OSError, IndexError):
        return ""


def test_a_command_does_not_outlive_who_waits_for_it(server: fuse.Served, tmp_path: Path) -> None:
    """If the command is killed by force, the process that does the work ends too."""
    server.stop()
    command = Command(tmp_path, ("info", "{remote}/a.img"))
    until(lambda: "fuse" in _waits_in(command))
    child = command.child()
    command.process.kill()
    command.process.wait()
    until(lambda: not Path(f"/proc/{child}").exists())
    server.go_on()


@pytest.mark.parametrize(
    ("words", "status"), [(("info", "aio:{home}/here.img"), 0), (("info", "aio:{home}/nowhere.img"), 2)]
)
def test_the_status_is_the_command_s(tmp_path: Path, words: tuple[str, ...], status: int) -> None:
    """The command has the exit status and the output of the process that does the work."""
    (tmp_path / "here.img").write_bytes(b"x" * SIZE)
    command = Command(tmp_path, words)

    assert status == command.status()
    assert command.said


@pytest.mark.parametrize(
    ("opcode", "words", "sentence"),
    [
        (fuse.READ, ("info", "{remote}/a.img"), "{remote}/a.img: read of "),
        (fuse.READ, ("check", "qcow2:{remote}/a.img"), "{remote}/a.img: read of "),
        (fuse.READ, ("convert", "aio:{remote}/a.img", "qcow2:{home}/new.qcow2"), "{remote}/a.img: read of "),
        (fuse.READ, ("compare", "aio:{home}/here.img", "aio:{remote}/a.img"), "{remote}/a.img: read of "),
        (fuse.WRITE, CONVERT_TO, "{remote}/b.img: write of "),
        (fuse.FSYNC, CONVERT_TO, "{remote}/b.img: flush: Input/output error"),
    ],
)
def test_an_error_names_file_and_place(
    server: fuse.Served, tmp_path: Path, opcode: int, words: tuple[str, ...], sentence: str
) -> None:
    """An EIO becomes one sentence: which file, which operation, how many bytes and where."""
    server.fail(errno.EIO, opcode)
    command = Command(tmp_path, words)
    status = command.status()
    server.fail(0, opcode)

    sentence = sentence.format(home=tmp_path, remote=tmp_path / "remote")
    if opcode != fuse.FSYNC:
        sentence = rf"{sentence}\d+ bytes at \d+: Input/output error"
    assert status in (1, 2)
    assert re.search(rf"^xenbackend: (aio:)?{sentence}$", command.said, re.MULTILINE), command.said
    assert "Traceback" not in command.said
