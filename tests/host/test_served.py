"""Whether guests depend on the running service."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.answering import Answering, answering
from xenbackend.errors import XenbackendError
from xenbackend.host import served
from xenbackend.host.served import control_sockets, refuse_while_serving
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.protocol.codes import Code


def serving(*names: str) -> Answering:
    """Return a function that answers as a service with these disks."""
    return lambda _: Answer(Code.OK, [{"vbd": name} for name in names])


def running(monkeypatch: pytest.MonkeyPatch, place: Path, *commands: str) -> None:
    """Have a host run these commands, beside us."""
    for pid, command in {str(os.getpid()): "python3 -I -m xenbackend.host.served", **dict(enumerate(commands))}.items():
        directory = place / "proc" / str(pid)
        directory.mkdir(parents=True)
        (directory / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    monkeypatch.setattr(served, "_PROC", place / "proc")


def test_a_service_is_looked_for_where_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service is looked for at the settings' socket and the default one; broken settings leave that unknown."""
    running(monkeypatch, tmp_path, "/usr/bin/python3 /usr/bin/xenbackend run")
    path = tmp_path / "x.toml"
    path.write_text('socket = "/elsewhere"\n')
    moved = control_sockets(path)
    path.write_text("")
    default = control_sockets(path)
    path.write_text("frob = 1\n")
    unknown = r"it is not known whether disks are served: .*no setting frob.*; process 0 may serve some, or use --force"
    with pytest.raises(XenbackendError, match=unknown):
        control_sockets(path)

    assert (["/elsewhere", DEFAULT_SOCKET], [DEFAULT_SOCKET]) == (moved, default)


def test_where_nobody_listens_nobody_is_served(tmp_path: Path) -> None:
    """Without a socket there is no service."""
    refuse_while_serving(str(tmp_path / "none"))


def test_a_service_without_disks_may_go(tmp_path: Path) -> None:
    """A service without disks may be stopped."""
    with answering(tmp_path / "socket", serving()) as control:
        refuse_while_serving(control.path)

    assert [{"verb": "status"}] == control.asked


def test_disks_are_named(tmp_path: Path) -> None:
    """The refusal counts the disks in service and names the first of them."""
    names = [f"{domid}/xvda" for domid in range(1, 8)]
    sentence = r"^guests have disks: 1/xvda, .*5/xvda \.\.\. \(7 in all\); detach"
    with (
        answering(tmp_path / "socket", serving(*names)) as control,
        pytest.raises(XenbackendError, match=sentence),
    ):
        refuse_while_serving(control.path)


@pytest.mark.parametrize(
    ("commands", "is_known"),
    [
        ([], True),
        (["/usr/bin/python3 /usr/bin/xenbackend uninstall", "vi /etc/xenbackend.toml", "man xenbackend"], True),
        (["/usr/bin/python3 /usr/bin/xenbackend run --socket /elsewhere"], False),
        (["/opt/venv/bin/python -m xenbackend run --keep"], False),
        (["/usr/bin/python3 -m xenbackend.worker.zygote --host xen"], False),
        (["/usr/bin/python3 -m xenbackend.worker.main --socket 5"], False),
    ],
)
def test_nobody_serves_without_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[str], *, is_known: bool
) -> None:
    """Without a service or a worker nothing is served, whatever the settings and a socket left behind say."""
    running(monkeypatch, tmp_path, *commands)
    path = tmp_path / "x.toml"
    path.write_text("frob = 1\n")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "socket"))

    found = []
    for look in (lambda: control_sockets(path), lambda: refuse_while_serving(str(tmp_path / "socket"))):
        try:
            look()
            found.append(True)
        except XenbackendError:
            found.append(False)
    assert [is_known] * 2 == found


def test_processes_that_cannot_be_listed_may_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc that is missing or not mounted does not show that no service runs."""
    path = tmp_path / "x.toml"
    path.write_text("frob = 1\n")
    for place in (tmp_path / "none", tmp_path):
        monkeypatch.setattr(served, "_PROC", place)
        with pytest.raises(XenbackendError, match=r"disks are served: .*does not show which processes run"):
            control_sockets(path)


def test_silence_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket without an answer may belong to a hanging service, so the answer is unknown."""
    running(monkeypatch, tmp_path, "/usr/bin/python3 /usr/bin/xenbackend run")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    with pytest.raises(XenbackendError, match=r"it is not known whether disks are served: .*or use --force"):
        refuse_while_serving(str(tmp_path / "socket"))


@pytest.mark.parametrize(("disks", "status"), [([], 0), (["5/xvda"], 1)])
def test_a_script_hears_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    disks: list[str],
    status: int,
) -> None:
    """The exit status tells scripts whether guests have disks; the sentence names the disks, but not our --force."""
    with answering(tmp_path / "socket", serving(*disks)) as control:
        monkeypatch.setattr(served, "control_sockets", lambda: [str(tmp_path / "none"), control.path])
        found = served.main()
    said = capsys.readouterr().err

    assert (status, status == 1) == (found, "guests have disks: 5/xvda; detach" in said)
    assert "--force" not in said
