"""Looks at the service, including one that does not answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, answering, working
from xenbackend.doctor import service
from xenbackend.doctor.finding import Finding, Verdict
from xenbackend.doctor.probes import Result
from xenbackend.host import activate
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

LOG = "journalctl -u xenbackend.service -n 50"
LISTENS = """
import signal, socket, sys
near = socket.socket(socket.AF_UNIX)
near.bind(sys.argv[1])
near.listen()
print(flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def unit(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What systemd says of the unit: nothing, unless a test fills it in."""
    facts: dict[str, str] = {}
    monkeypatch.setattr(activate, "unit_facts", lambda _limit_s: facts)
    monkeypatch.setattr(service, "ANSWER_S", 0.3)
    return facts


def only(result: Result) -> Finding:
    """Return the only finding."""
    [found] = result.findings
    return found


def test_what_it_says_is_handed_on(tmp_path: Path) -> None:
    """A service that answers is well; what it says of itself and its disks is passed on to the looks that follow."""

    def answer(request: dict[str, Any]) -> Answer:
        said = working(request)
        return Answer(Code.OK, {**said.data, "pid": os.getpid()}) if request["verb"] == "ping" else said

    with answering(tmp_path / "x", answer) as control:
        found = service.look(control.path)

    assert ["service", "descriptors", "walls"] == [each.check for each in found.findings]
    assert {Verdict.OK} == {each.verdict for each in found.findings}
    assert [DISK] == found.data["disks"]


@pytest.mark.parametrize(
    ("facts", "sentence", "command"),
    [
        ({}, "systemd does not run this host", "xenbackend run --detach"),
        ({"LoadState": "not-found"}, "its unit is not installed", "xenbackend install"),
        ({"LoadState": "masked"}, "its unit is masked", "systemctl unmask xenbackend.service"),
        ({"ActiveState": "inactive"}, "its unit is inactive", "systemctl start xenbackend"),
        ({"ActiveState": "inactive", "ConditionResult": "no", "ConditionTimestampMonotonic": "5"},
         "this host was not booted under Xen", "systemctl status xenbackend.service"),
        ({"ActiveState": "failed", "Result": "exit-code"}, "has failed (exit-code)", LOG),
        ({"ActiveState": "activating", "StatusText": "newer"}, "is being started, newer", LOG),
        ({"ActiveState": "active"}, "on another socket", "xenbackend config show"),
    ],
)  # fmt: skip
def test_why_nobody_answers_is_systemds_word(
    tmp_path: Path, unit: dict[str, str], facts: dict[str, str], sentence: str, command: str
) -> None:
    """If nobody answers, each state of the unit has its own sentence and command."""
    unit.update(facts)
    found = only(service.look(str(tmp_path / "none")))

    assert (Verdict.WRONG, "service", command) == (found.verdict, found.check, found.command)
    assert sentence in found.sentence


@pytest.mark.parametrize("is_stopped", [True, False])
def test_one_that_hangs_is_told_with_its_process(tmp_path: Path, *, is_stopped: bool) -> None:
    """A service that hangs is reported with its process, and whether that was stopped by a signal or is busy."""
    path = tmp_path / "x"
    process = subprocess.Popen([sys.executable, "-c", LISTENS, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        found = only(service.look(str(path)))
    finally:
        process.kill()
        process.communicate()

    assert Verdict.WRONG is found.verdict
    assert (
        f"its process, {process.pid}, {'has been stopped' if is_stopped else 'runs but does not answer'}"
        in found.sentence
    )
    assert is_stopped == (f"kill -CONT {process.pid}" == found.command)


def test_one_that_may_not_be_asked_is_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the caller may not ask the service, the finding is unknown and not wrong."""

    def connect(_near: socket.socket, _path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", connect)
    found = only(service.look(str(tmp_path / "x")))

    assert (Verdict.UNKNOWN, "sudo xenbackend doctor") == (found.verdict, found.command)


def test_descriptors_that_run_out_are_told_before_they_have(tmp_path: Path, unit: dict[str, str]) -> None:
    """Descriptors that run low, in the service or in systemd's store, are reported; an unknown process is unknown."""
    (tmp_path / "7/fd").mkdir(parents=True)
    for number in range(95):
        (tmp_path / "7/fd" / str(number)).touch()

    def look(most: int) -> Finding:
        (tmp_path / "7/limits").write_text(f"Max open files            {most}                 4096 files\n")
        [found] = service.descriptors(7, tmp_path)
        return found

    assert Verdict.OK is look(1000).verdict
    assert "95 of 100 descriptors open" in look(100).sentence
    unit.update({"MainPID": "7", "NFileDescriptorStore": "8000", "FileDescriptorStoreMax": "8192"})
    assert "systemd keeps 8000 of 8192" in look(1000).sentence
    assert look(1000).is_wrong
    assert Verdict.UNKNOWN is service.descriptors(8, tmp_path)[0].verdict


def test_missing_walls_are_told_once_for_all_disks() -> None:
    """A wall that several workers lack is one finding, with the reason and the number of workers."""
    without = {**DISK, "no_walls": {"landlock": "not supported"}}
    [found] = service.look_at_walls([DISK, {**without, "vbd": "6/xvda"}, without])

    assert found.is_wrong
    assert "2 workers are not behind all walls: landlock (not supported)" == found.sentence
    assert Verdict.OK is service.look_at_walls([DISK])[0].verdict
    assert [] == service.look_at_walls([])
