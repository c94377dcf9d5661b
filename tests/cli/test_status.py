"""The command status against a control socket that gives prepared answers."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests import answering
from tests.answering import DISK, Control, moved, working
from xenbackend.cli import pictures
from xenbackend.cli.main import main
from xenbackend.cli.pictures import Picture, Speed
from xenbackend.cli.status import COLUMNS
from xenbackend.client import Disk
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code


def disk(**changes: Any) -> dict[str, Any]:
    """Return a description of a disk, with some of it changed."""
    return {**deepcopy(DISK), **changes}


OTHER = disk(vbd="6/xvdb", node="vbd3/6/51728", kind="vbd3", domid=6, guest="web", device="xvdb", chain="ram:1G")


class Service:
    """A service whose disks a test sets; each look takes the next picture, and the last one repeats."""

    def __init__(self) -> None:
        self.pictures: list[list[dict[str, Any]]] = [[disk(), OTHER]]
        self.looks = 0

    def answer(self, request: dict[str, Any]) -> Answer:
        """Answer as the service does."""
        if request["verb"] == "status":
            self.looks += 1
            return Answer(Code.OK, self.pictures.pop(0) if len(self.pictures) > 1 else self.pictures[0])
        return working(request)


@pytest.fixture
def service() -> Service:
    """The service that answers."""
    return Service()


@pytest.fixture
def control(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Its control socket, with sleeping switched off."""
    monkeypatch.setattr(pictures, "SAMPLE_S", 0.0)
    with answering.answering(tmp_path / "x", service.answer) as made:
        yield made


def test_json_is_all_that_the_service_knows(control: Control, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has the service and each disk as the service describes them, with nothing added or left out."""
    assert 0 == main(["status", "--json", "--socket", control.path])

    assert {
        "version": 1,
        "service": {
            "pid": 11,
            "version": "0.1.0",
            "since": 0.0,
            "bugs": 0,
            "breaches": 0,
            "host": "xenbackend.rig.host:/x",
            "store": "/run/xenstored/socket",
            "store_error": "",
            "waits": [{"vbd": "5/xvda", "for": "its chain"}],
        },
        "vbds": [disk(), OTHER],
    } == json.loads(capsys.readouterr().out)


def test_piped_it_is_one_line_for_each_disk(
    control: Control, service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe each disk has one line, with a word in each column and the whole chain, at any terminal width."""
    monkeypatch.setenv("COLUMNS", "40")
    chain = f"aio:/img/\x1b[2J{'x' * 300}"
    later = moved(disk(), reads=50, read_bytes=8192, latency_samples=10, latency_ns=1_000_000)
    service.pictures = [[disk(chain=chain)], [{**later, "chain": chain}]]
    monkeypatch.setattr(time, "monotonic", lambda: 2.0 * service.looks)
    monkeypatch.setattr(time, "time", lambda: 7300.0)
    assert 0 == main(["status", "--socket", control.path])
    heading, line = capsys.readouterr().out.splitlines()

    assert list(COLUMNS) == heading.split()
    assert [
        "5/xvda", "mail", "Connected", "12", "2h", "0.1.0", "0", "25", "0", "4096", "0", "100", "131", "3",
        rf"aio:/img/\x1b[2J{'x' * 300}",
    ] == line.split()  # fmt: skip


def test_why_a_disk_is_not_served_stands_in_its_line(
    control: Control, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says in a word and in sentences who paused a disk, what holds it, and which orders are under way."""
    paused = disk(paused=True, paused_by="uid 0, pid 7 (bash)", under_way=[{"order": 18, "verb": "set"}])
    waits = {**OTHER, "reason": "flush-failed", "error": "a flush failed: EIO", "waits_s": 12.3, "waits_for": "storage"}
    makes = {**OTHER, "reason": "key", "error": "the key is being derived", "waits_s": 61, "waits_for": "key"}
    service.pictures = [[paused, waits, makes]]
    main(["status", "--socket", control.path])
    _, first, second, third = capsys.readouterr().out.splitlines()

    assert "paused" == first.split()[2]
    assert first.endswith("log:|aio:/img  # paused by uid 0, pid 7 (bash)  # set is under way, order 18")
    assert "flush-failed" == second.split()[2]
    assert second.endswith("ram:1G  # a flush failed: EIO  # its storage has not answered for 12s")
    assert third.endswith("ram:1G  # the key is being derived  # its key has taken 1m to derive so far")


def test_a_name_that_means_another_file_stands_in_the_line(
    control: Control, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a file name of a disk now leads to another file, or to none, the line says so and which file is served."""
    files = [
        {"file": "/same", "now": "same", "difference": ""},
        {"file": "/img", "now": "other", "difference": "it is another file, inode 9 and not 2"},
        {"file": "/parent", "now": "gone", "difference": "No such file or directory"},
    ]
    service.pictures = [[disk(files=files)]]
    main(["status", "--socket", control.path])
    line = capsys.readouterr().out.splitlines()[1]

    other = "/img now leads to another file: it is another file, inode 9 and not 2; the disk is served from the former"
    assert line.endswith(
        f"  # {other} one  # /parent is no longer the name of a file; the disk is served from the file that had it"
    )
    assert "Connected" == line.split()[2]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["5/xvda"], ["5/xvda"]), (["web/xvdb"], ["6/xvdb"]), (["vbd3/6/51728"], ["6/xvdb"]),
        (["web/xvdb", "mail/xvda"], ["5/xvda", "6/xvdb"]), ([], ["5/xvda", "6/xvdb"]),
    ],
)  # fmt: skip
def test_only_the_disks_that_are_named(
    control: Control, capsys: pytest.CaptureFixture[str], names: list[str], found: list[str]
) -> None:
    """Disks may be named by domain or guest, in any spelling."""
    assert 0 == main(["status", *names, "--json", "--socket", control.path])

    assert found == [each["vbd"] for each in json.loads(capsys.readouterr().out)["vbds"]]


def test_a_disk_that_is_not_served_is_a_mistake(control: Control, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that is not in service is refused with status 2 and a list of those that are."""
    assert 2 == main(["status", "7/xvda", "--socket", control.path])
    assert "there is no disk 7/xvda in service; there are 5/xvda, 6/xvdb" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "found"), [("disk", "56"), ("reads", "65"), ("chain", "56"), ("guest", "56"),
                                            ("latency", "65"), ("errors", "56")])  # fmt: skip
def test_sorting(control: Control, service: Service, capsys: pytest.CaptureFixture[str], key: str, found: str) -> None:
    """The busiest, slowest or most faulty disk comes first; names are sorted in ascending order."""
    other = {**OTHER, "counters": {**OTHER["counters"], "errors": 0}}
    service.pictures = [[disk(), other], [disk(), moved(other, reads=9, latency_samples=9, latency_ns=9000)]]
    main(["status", "--sort", key, "--socket", control.path])
    _, *lines = capsys.readouterr().out.splitlines()

    assert found == "".join(line[0] for line in lines)


@pytest.mark.parametrize(("text", "sentence"), [("0", "too short"), ("0.9", "too short"), ("soon", "no")])
def test_watching_faster_than_counters_change_is_refused(
    capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    """An interval shorter than that of the workers' sums is refused: counters would stand still, then jump."""
    with pytest.raises(SystemExit) as end:
        main(["status", "--watch", text])

    assert 2 == end.value.code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_watching_into_a_pipe_is_written_at_once(
    control: Control, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    """Each look is flushed before the next one is waited for, until the reader or the operator ends it."""
    seen: list[str] = []
    written = io.StringIO()
    flushed = io.StringIO()
    monkeypatch.setattr(written, "flush", lambda: (flushed.seek(0), flushed.write(written.getvalue())))

    def sleep(_: float) -> None:
        seen.append(flushed.getvalue())
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setattr(time, "sleep", sleep)
    assert 0 == main(["status", "--watch", *form, "--socket", control.path])

    assert [1, 2, 3] == [each.count("6/xvdb") for each in seen]


def test_watched_rates_are_of_each_interval(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --watch each block's rates are those since the block before."""
    spans: list[tuple[float, float]] = []
    really_arranged = pictures.arranged

    def arranged(args: argparse.Namespace, before: Picture, after: Picture) -> list[tuple[Disk, Speed]]:
        spans.append((before.at, after.at))
        return really_arranged(args, before, after)

    def sleep(_: float) -> None:
        if len(spans) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "arranged", arranged)
    monkeypatch.setattr(time, "sleep", sleep)
    assert 0 == main(["status", "--watch", "--socket", control.path])

    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]


def test_no_service_is_told_with_how_to_start_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If no service answers, the exit status is 1 and the message says how to start one."""
    assert 1 == main(["status", "--socket", str(tmp_path / "none")])
    assert "systemctl start xenbackend" in capsys.readouterr().err
