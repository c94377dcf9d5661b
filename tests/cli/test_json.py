"""docs/json.md says what commands print with --json: no more and no less."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, LAYER, answering, working
from tests.helpers_block import Machine
from xenbackend.bench.disturbance import Usage
from xenbackend.bench.report import as_json
from xenbackend.block import record
from xenbackend.block.record import Entry, Lost, Session
from xenbackend.block.request import Op
from xenbackend.cli.main import MODULES, main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import EXIT_STATUS, Code
from xenbackend.rig.store import Xenstored

PAGE = Path(__file__).parents[2] / "docs/json.md"
ROW = re.compile(r"^\| (`.*?|\*`.*?) \| (.*?) \| ", re.MULTILINE)
NAME = re.compile(r"(\*?)`([a-z_0-9.\[\]]+)`(\*?)")
UNSEEN = {  # what needs a failure, a host, or a cluster
    "image": {"owner"},
    "upgrade, stop": {"vbds[].error.code", "vbds[].error.sentence", "waits[].vbd", "waits[].for"},
    "log status, log start, log stop, log clear": {"problem"},
    "install, uninstall": {"steps[].command"},
}
SECTIONS = {  # commands whose objects together have every key of the section
    "status": ["status"],
    "metrics": ["metrics"],
    "top": ["top --once --interval 1"],
    "latency": ["latency 5/xvda --total"],
    "latency --layers": ["latency 5/xvda --layers --interval 1"],
    "orders": ["orders"],
    "pause, resume, policy": ["pause 5/xvda", "resume 5/xvda", "policy 5/xvda"],
    "set, snapshot, resize, cow keep, cow drop": [
        "set 5/xvda aio:/a", "set 5/xvda aio:/a --dry-run", "snapshot 5/xvda /a", "resize 5/xvda",
        "cow keep 5/xvda /a", "cow drop 5/xvda",
    ],
    "upgrade, stop": ["upgrade", "upgrade 5/xvda", "stop"],
    "check": ["check log:|ram:1M", "check --disk tap2:ram:1M,xvda,w"],
    "drivers": ["drivers"],
    "log get, log peek": ["log get 5/xvda", "log peek 5/xvda"],
    "log status, log start, log stop, log clear": ["log status 5/xvda"],
    "completion": ["completion bash"],
    "log show": ["log show guest.rec"],
    "log show --summary": ["log show guest.rec --summary"],
    "install, uninstall": ["install --root host", "install --root host --dry-run", "uninstall --root host"],
    "convert": ["convert vm.cfg", "convert vm.cfg --in-place"],
    "image": [
        "image create qcow2 a.qcow2 1M", "image info a.qcow2", "image check qcow2:a.qcow2",
        "image snapshot qcow2:a.qcow2 b.qcow2", "image commit qcow2:b.qcow2", "image resize qcow2:b.qcow2 2M",
        "image convert qcow2:b.qcow2 aio:c.raw", "image compare qcow2:b.qcow2 aio:c.raw",
        "image measure qcow2 aio:c.raw", "image trust qcow2:b.qcow2",
        "image rebase qcow2:b.qcow2 --no-parent", "image info bad.qcow2",
    ],
    "config show": ["config show --defaults"],
    "run": ["run --check --config x.toml"],
}  # fmt: skip


def section(heading: str) -> str:
    """Return the text below a heading."""
    return PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def documented(heading: str) -> tuple[set[str], set[str]]:
    """Return the keys that are always there, and those that may be; the keys of layers are in sections of their own."""
    always: set[str] = set()
    maybe: set[str] = set()
    for names, kind in ROW.findall(section(heading)):
        for before, name, after in NAME.findall(names):
            place = maybe if before and after else always
            if kind == "layers":
                place |= {f"{name}.{each}" for each in documented("Layers")[0]}
            else:
                place.add(name)
    return always, maybe


def maps(heading: str) -> set[str]:
    """Return the keys whose values are objects whose own keys are not listed."""
    found = {
        name
        for names, kind in ROW.findall(section(heading))
        for _, name, _ in NAME.findall(names)
        if kind.startswith("map")
    }
    return found | {f"{layers}.facts" for layers in ("layers[]", "vbds[].layers[]")}


def keys(value: Any, free: set[str], at: str = "") -> set[str]:
    """Return the keys of a value as the page writes them."""
    if at in free:
        return {at}
    if isinstance(value, dict):
        return {key for name, inner in value.items() for key in keys(inner, free, f"{at}.{name}" if at else name)}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {key for inner in value for key in keys(inner, free, f"{at}[]")}
    return {at}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a record file, a guest's configuration, and a root to install into."""
    monkeypatch.chdir(tmp_path)
    entry = Entry(1_700_000_000_000_000_000, 0, 4096, 20_000, 0, Op.READ)
    session = record.pack_session(Session(1 << 20, entry.time_ns, 512, 1))
    lost = record.pack_lost(Lost(entry.time_ns, 3))
    (tmp_path / "guest.rec").write_bytes(session + record.pack_request(entry) + lost)
    (tmp_path / "vm.cfg").write_text("disk = ['tap2:aio:/img,xvda,w']\n")
    (tmp_path / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\3 and no more")
    (tmp_path / "host").mkdir()
    (tmp_path / "x.toml").touch()
    return tmp_path


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_is_what_commands_print(place: Path, capsys: pytest.CaptureFixture[str], heading: str) -> None:
    """The commands print every key that the page says is always there, and no other keys; every listed key occurs."""
    always, maybe = documented(heading)
    seen = set(always) if not SECTIONS[heading] else set()
    with answering(place / "x", answer) as control:
        for line in SECTIONS[heading]:
            words = shlex.split(line)
            main([*words, "--json", *(["--socket", control.path] if asks(words) else [])])
            text = capsys.readouterr().out
            for each in map(json.loads, [text] if text.startswith("{\n") else text.splitlines()):
                found = keys(each, maps(heading))
                empty = {key for key in found if any(one.startswith(f"{key}[].") for one in always | maybe)}
                assert set() == found - empty - always - maybe, line
                assert (
                    set() == {one for one in always if not one.startswith(tuple(f"{key}[]" for key in empty))} - found
                ), line
                seen |= found

    assert set() == (always | maybe) - seen - UNSEEN.get(heading, set())


def asks(words: list[str]) -> bool:
    """Return whether a command asks the service."""
    orders = (
        "status",
        "top",
        "latency",
        "metrics",
        "orders",
        "pause",
        "resume",
        "policy",
        "set",
        "snapshot",
        "resize",
        "cow",
        "upgrade",
        "stop",
    )
    return words[0] in orders or (words[0] == "log" and words[1] != "show")


def answer(request: dict[str, Any]) -> Answer:
    """Answer as a service does, with a disk with layers and an order under way; its log: layer is a real one."""
    if request["verb"] == "status":
        layers = [
            {"layer": layer["text"], **{key: layer[key] for key in layer if key != "text"}, "figures": {"held": 1}}
            for layer in [LAYER]
        ]
        counted = {"latency_histogram": [0] * 17 + [5] + [0] * 30, "under_way": [{"order": 3, "verb": "set"}]}
        return Answer(Code.OK, [{**DISK, "layers": layers, **counted}])
    if request["verb"] == "command" and request["command"] == "status":
        machine = Machine()
        chain = machine.open(f"log:{Path.cwd()}/new.rec|ram:1M", checked=False)
        data = chain.control("log", "status", []).decode()
        chain.close()
        machine.close()
        return Answer(Code.OK, data, order=17)
    return working(request)


def test_attach_and_detach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both print the disk; only a disk for our own domain has a device, which a test without Xen cannot have."""
    always, maybe = documented("attach, detach")
    answer = Answer(Code.OK, order=17)
    with Xenstored(tmp_path / "store") as xenstored, answering(tmp_path / "x", lambda _: answer) as control:
        xenstored.add_domain_socket(5)
        store = ["--store", xenstored.address, "--json"]
        xenstored_has_domain(xenstored)
        assert 0 == main(["attach", "5/xvdb", "null:1G", *store, "--socket", control.path])
        assert 0 == main(["detach", "5", "xvdb", *store, "--force", "--timeout", "0"])
    attached, detached = map(json.loads, capsys.readouterr().out.splitlines())

    assert always | maybe - {"device"} == set(attached)
    assert always == set(detached)


def xenstored_has_domain(xenstored: Xenstored) -> None:
    """Make domain 5 exist."""
    from xenbackend.supervisor.xenstore.store import Store

    with Store(xenstored.address) as store:
        store.write("/local/domain/5/name", "mail")


@pytest.mark.slow
def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """`demo --json` prints the summary and nothing else."""
    always, maybe = documented("demo")
    assert 0 == main(["demo", "--json", "--seconds", "0.1", "--area", "64K"])

    assert (set(), always) == (maybe, keys(json.loads(capsys.readouterr().out), maps("demo")))


def test_bench() -> None:
    """The page lists exactly the keys of the session's JSON without rows."""
    usage = Usage(1.0, 0.0, 0.0, 0.0, autogroup=False, programs=[("make", 1.0)])
    always, maybe = documented("bench")
    found = keys({"version": 1, **as_json([], usage)}, maps("bench"))

    assert (set(), set()) == (
        maybe,
        {key.removesuffix("[]") for key in always} ^ {key.removesuffix("[]") for key in found},
    )


def test_errors() -> None:
    """The page lists the program's codes with their exit statuses."""
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", section("Codes"), re.MULTILINE)

    assert {(code.value, str(status)) for code, status in EXIT_STATUS.items()} == set(rows)
    assert {"version", "error.code", "error.sentence"} == documented("Errors")[0]


def test_every_command_has_its_section() -> None:
    """Every command except xl has a section."""
    headings = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    named = {word for each in headings for word in re.findall(r"[a-z]+", each)}

    assert set() == set(MODULES) - named - {"xl"}
    assert set(SECTIONS) <= set(headings)
