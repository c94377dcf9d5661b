"""How every command ends: one table of codes, with and without a service, for people and for scripts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.cli.main import MODULES, main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import EXIT_STATUS, Code

ASKING = [  # commands that ask the service, with their arguments
    "status", "pause 5/xvda", "resume 5/xvda", "set 5/xvda aio:/new", "set 5/xvda aio:/new --dry-run", "resize 5/xvda",
    "snapshot 5/xvda /new", "policy 5/xvda", "policy 5/xvda enospc=report", "upgrade", "upgrade 5/xvda", "stop",
    "cow keep 5/xvda /new", "cow drop 5/xvda",
    "orders", "orders 17", "metrics", "log get 5/xvda", "log peek 5/xvda", "log start 5/xvda",
    "log status 5/xvda", "latency 5/xvda --total",
]  # fmt: skip
MISTAKES = [  # {} is a directory with a file `taken` and nothing else
    "pause", "pause foo", "pause 5/frob", "pause 5/xvda now", "resume foo", "resume 5/xvda --timeout soon",
    "set foo null:1G", "set 5/xvda", "set 5/xvda nosuch:x", "set 5/xvda 'log:|'", "set 5/xvda aio:relative",
    "set 5/xvda null:1G --dry", "resize foo", "snapshot foo /new", "snapshot 5/xvda",
    "snapshot 5/xvda /x --format frob", "snapshot 5/xvda @", "snapshot 5/xvda @a/b", "snapshot 5/xvda @a@b",
    "snapshot 5/xvda @monday --format qcow2", "snapshot foo @monday",
    "cow", "cow keep 5/xvda", "cow keep foo /new", "cow drop foo",
    "policy foo", "policy 5/xvda bla", "policy 5/xvda flush=report", "upgrade foo", "stop now", "orders x",
    "status foo", "metrics now", "metrics --listen 10.0.0.1:80", "metrics --listen 127.0.0.1:http",
    "metrics --textfile {}/taken", "status 5/xvda 5/frob", "status --watch 0.2", "status --sort frob",
    "attach", "attach 5/xvda", "attach foo null:1G", "attach 5 frob null:1G", "attach 5/xvda nosuch:x",
    "attach 5/xvda aio:relative", "detach", "detach foo", "detach 5", "detach 5/xvda --timeout soon",
    "check", "check nosuch:x", "check aio:{}/missing", "drivers frob", "log", "log frob", "log get foo",
    "log get 5/xvda --json --binary", "log show {}/missing", "log show {}/taken --since later", "log show {}/taken",
    "demo nosuch:x", "demo aio:{}/missing/image", "demo --area 1", "demo --save {}/taken", "bench nosuch:x",
    "bench --work frob", "install frob", "install --packaged", "uninstall frob", "convert", "convert {}/missing",
    "image", "image frob", "image info {}/missing", "image info nosuch:x", "image create qcow2 {}/taken 1M",
    "image create frob {}/new 1M", "image check qcow2:{}/missing", "image snapshot qcow2:{}/missing {}/new",
    "image commit qcow2:{}/missing", "image resize aio:{}/missing 1M", "image map aio:{}/missing",
    "image convert aio:{}/missing aio:{}/new", "image compare aio:{}/missing aio:{}/taken",
    "image measure qcow2 aio:{}/missing", "image rebase qcow2:{}/missing --no-parent", "run --serve frob",
    "run --config {}/missing", "run --check --config {}/missing", "config", "config frob",
    "config show --config {}/missing", "completion", "completion tcsh", "top foo --once",
    "top --count 0", "top --interval 0.2", "top --sort frob", "latency",
    "latency foo", "latency 5/xvda --layers --total", "latency 5/xvda --interval soon", "doctor foo",
    "doctor --frob", "report now", "check --disk tap2:ram:1M,xvda,x", "check tap2:ram:1M,xvda,w",
    "report --output {}/taken", "frob", "--frob",
]  # fmt: skip
HAVE_NO_SERVICE = (
    "config",
    "drivers",
    "demo",
    "bench",
    "install",
    "uninstall",
    "convert",
    "image",
    "check",
    "run",
    "completion",
)


def status_of(words: list[str]) -> int:
    """Return a command's exit status, also if its arguments cannot be parsed."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_every_code_has_an_exit_status() -> None:
    """Every code has an exit status; a user's mistake, a failure and an order under way have different ones."""
    assert set(Code) == set(EXIT_STATUS)
    assert {0: [Code.OK], 2: [Code.INVALID], 75: [Code.UNDER_WAY]} == {
        status: [code for code in Code if EXIT_STATUS[code] == status] for status in (0, 2, 75)
    }
    assert {0, 1, 2, 75} == set(EXIT_STATUS.values())


@pytest.mark.parametrize("line", ASKING)
@pytest.mark.parametrize("code", Code)
def test_a_code_of_the_service_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, code: Code
) -> None:
    """Every command passes on the service's answer: its exit status, its code and its sentence."""
    verbs = ("ping", "status") if line.partition(" ")[0] not in ("status", "metrics", "latency") else ()

    def answer(request: dict[str, object]) -> Answer:
        is_meant = code is not Code.OK and request["verb"] not in verbs
        return Answer(code, None, "it\x1b[2J cannot be", 17) if is_meant else working(request)

    with answering(tmp_path / "x", answer) as control:
        words = [*shlex.split(line), "--socket", control.path]
        plain, said = status_of(words), capsys.readouterr()
        scripted, values = status_of([*words, "--json"]), capsys.readouterr().out

    assert (EXIT_STATUS[code], EXIT_STATUS[code]) == (plain, scripted)
    assert (code is not Code.OK) == said.err.startswith("xenbackend: ")
    assert "\x1b" not in said.err
    if code is not Code.OK:
        found = json.loads(values)
        error = found["vbds"][0]["error"] if line == "upgrade" else found["error"]
        assert (1, code.value) == (found["version"], error["code"])
        assert error["sentence"]


@pytest.mark.parametrize("line", MISTAKES)
@pytest.mark.parametrize("has_service", [True, False])
def test_a_mistake_is_two_and_asks_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, has_service: bool
) -> None:
    """A wrong argument ends each command with status 2 and a reason, also in JSON; the service gets no order."""
    command = line.split(maxsplit=1)[0] if line.split(maxsplit=1)[0] in MODULES else "--frob"
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "taken").write_bytes(b"x" * 512)
    monkeypatch.setattr("xenbackend.kernel.process.boost", lambda _: None)  # else all later tests have it too
    monkeypatch.chdir(directory)
    words = shlex.split(line.replace("{}", str(directory)))
    with answering(tmp_path / "x", working) as control:
        if (
            has_service
            and command not in HAVE_NO_SERVICE
            and command != "--frob"
            and "show" not in words
            and words != ["log"]
        ):
            words += [] if words[0] == "detach" else ["--socket", control.path]
        plain, said = status_of(words), capsys.readouterr()
        as_json = ["--json"] if "--json" not in words else []
        scripted, values = status_of([*words, *as_json]), capsys.readouterr().out

    assert (2, 2) == (plain, scripted)
    assert "" == said.out or "--json" in line
    assert "xenbackend" in said.err
    assert "Traceback" not in said.err
    found = json.loads(values)
    assert (1, "invalid") == (found["version"], found["error"]["code"])
    assert found["error"]["sentence"]
    assert {"ping", "status"} >= {each["verb"] for each in control.asked}
    assert ["taken"] == [each.name for each in directory.iterdir()]


def test_every_command_has_its_mistake() -> None:
    """The table has a mistake for every command except xl, which checks its own arguments."""
    assert set(MODULES) - {"xl"} <= {line.split()[0] for line in MISTAKES}


@pytest.mark.parametrize("line", ASKING)
def test_without_a_service_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Without a service a valid command ends with status 1 and says how to start the service."""
    assert 1 == status_of([*shlex.split(line), "--json", "--socket", str(tmp_path / "none")])
    captured = capsys.readouterr()
    assert "unreachable" == json.loads(captured.out)["error"]["code"]
    assert "systemctl start xenbackend" in captured.err
