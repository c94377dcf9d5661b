"""The command orders, and what every order prints, against a control socket that gives prepared answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.answering import CHAIN, DISK, ENTRY, answering, working
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

FAILED = {**ENTRY, "number": 18, "verb": "pause", "from": "", "to": "", "code": "failed", "error": "no\x1b[2J"}
BEGAN = datetime.fromtimestamp(ENTRY["began"], UTC)  # with its zone, which what is printed must have
OPEN = {**ENTRY, "number": 19, "ended": None, "code": "under-way"}


def test_a_line_for_each_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line has who gave the order for which disk, when, how it ended, and what changed, with an escaped sentence."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK, [ENTRY, FAILED, OPEN])) as control:
        assert 0 == main(["orders", "--socket", control.path])
    heading, *lines = capsys.readouterr().out.splitlines()

    assert heading.split() == ["order", "began", "took", "by", "disk", "what", "ended", "from", "->", "to"]
    assert [line.split()[0] for line in lines] == ["17", "18", "19"]
    assert "2.5s" == lines[0].split()[2]
    assert BEGAN == datetime.fromisoformat(lines[0].split()[1])
    assert lines[0].endswith("xenbackend[33],uid=0  5/xvda  set    ok         aio:/img -> log:|aio:/img")
    assert lines[1].endswith(r"pause  failed     -  # no\x1b[2J")
    assert "under way" in lines[2]


def test_one_order_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a number, the command asks the service for that order only."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK, [ENTRY])) as control:
        assert 0 == main(["orders", "17", "--socket", control.path])
        assert 0 == main(["orders", "17", "--json", "--socket", control.path])
    *lines, values = capsys.readouterr().out.splitlines()
    said = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    assert [{"verb": "orders", "order": 17}] * 2 == control.asked
    assert ("17", "set", "5/xvda", "2.5s", "ok") == tuple(
        said[key] for key in ("order", "what", "disk", "took", "ended")
    )
    assert ("aio:/img", "log:|aio:/img") == (said["from"], said["to"])
    assert BEGAN == datetime.fromisoformat(said["began"])
    assert {"version": 1, "orders": [ENTRY]} == json.loads(values)


def test_an_order_has_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that is not valid is refused without asking a service."""
    with pytest.raises(SystemExit):
        main(["orders", "5/xvda"])

    assert "argument N: '5/xvda' is not the number of an order, such as 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "request_", "said"),
    [
        (["set", "5/xvda", "aio:/a"], {"verb": "set", "chain": "aio:/a"}, "5/xvda is served by log:|aio:/img; "),
        (["set", "5/xvda", "aio:/a", "--replace"], {"verb": "set", "chain": "aio:/a", "replace": True},
         "5/xvda is served by log:|aio:/img; "),
        (["set", "5/xvda", "aio:/a", "--dry-run"], {"verb": "set", "chain": "aio:/a", "dry_run": True},
         "before: aio:/img\nafter: log: | aio:/img"),
        (["snapshot", "5/xvda", "/new", "--format", "vhd"], {"verb": "snapshot", "file": "/new", "format": "vhd"},
         "log:|aio:/img"),
        (["resize", "5/xvda"], {"verb": "resize"}, "5/xvda has 1 GiB"),
        (["pause", "5/xvda"], {"verb": "pause"}, "5/xvda is paused; to continue: xenbackend resume 5/xvda"),
        (["resume", "5/xvda"], {"verb": "resume"}, "5/xvda continues"),
        (["policy", "5/xvda"], {"verb": "policy", "policy": ""}, "enospc=pause"),
        (["upgrade", "5/xvda"], {"verb": "upgrade"}, "5/xvda is served by a new process"),
    ],
)  # fmt: skip
def test_what_an_order_asks_and_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], request_: dict[str, Any], said: str
) -> None:
    """Each command sends what its words ask for, with the caller's time limit, and prints the state that results."""
    with answering(tmp_path / "x", working) as control:
        assert 0 == main([*words, "--socket", control.path])
        assert 0 == main([*words, "--socket", control.path, "--timeout", "2.5", "--json"])
    out = capsys.readouterr().out

    asked = [each for each in control.asked if each["verb"] != "ping"]  # which asks for the service's version
    assert [{**request_, "vbd": "5/xvda"}, {**request_, "vbd": "5/xvda", "wait": 2.5}] == asked
    assert out.startswith(said)
    assert 1 == json.loads(out.splitlines()[-1])["version"]


@pytest.mark.parametrize("words", [["set", "5/xvda", "aio:/new"], ["snapshot", "5/xvda", "/new"]])
@pytest.mark.parametrize("code", [Code.FAILED, Code.BUSY, Code.UNDER_WAY, Code.GONE])
def test_the_chain_in_service_is_printed_whenever_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: Code
) -> None:
    """If an order failed or is not done yet, the chain that the guest has is still printed."""

    def answer(request: dict[str, Any]) -> Answer:
        return working(request) if request["verb"] == "ping" else Answer(code, CHAIN, "not now", 17)

    with answering(tmp_path / "x", answer) as control:
        main([*words, "--socket", control.path])
        plain = capsys.readouterr()
        main([*words, "--socket", control.path, "--json"])
        values = json.loads(capsys.readouterr().out)

    assert "5/xvda is served by log:|aio:/img\n" == plain.out
    assert (
        "not now" if code is not Code.UNDER_WAY else "still under way, order 17; see: xenbackend orders 17"
    ) in plain.err
    assert ("log:|aio:/img", 17, code.value) == (values["chain"], values["order"], values["error"]["code"])


def test_upgrade_goes_through_all_disks_and_says_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that cannot be replaced does not stop the others; the exit status is that of the first failure."""
    disks = [{**DISK, "vbd": name} for name in ("5/xvda", "5/xvdb", "6/xvda")]

    def answer(request: dict[str, Any]) -> Answer:
        if request["verb"] == "status":
            return Answer(Code.OK, disks)
        if request["verb"] == "orders":
            return Answer(Code.OK, [])
        return Answer(Code.UNDER_WAY, None, "x", 20) if request["vbd"] == "5/xvdb" else working(request)

    with answering(tmp_path / "x", answer) as control:
        status = main(["upgrade", "--timeout", "1", "--socket", control.path])
        captured = capsys.readouterr()
        main(["upgrade", "--json", "--socket", control.path])
    done = json.loads(capsys.readouterr().out)["vbds"]

    assert 75 == status
    assert "5/xvda is served by a new process\n6/xvda is served by a new process\n" == captured.out
    assert "5/xvdb: upgrade is still under way, order 20; see: xenbackend orders 20" in captured.err
    assert [("5/xvda", None), ("5/xvdb", "under-way"), ("6/xvda", None)] == [
        (each["vbd"], each.get("error", {}).get("code")) for each in done
    ]
