"""`xenbackend log` on real record files, and through a real control socket to a real `log:` layer."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.answering import Control
from tests.helpers_block import Machine, write
from xenbackend.block import record
from xenbackend.block.chain import Chain
from xenbackend.block.record import Entry, Lost, Session
from xenbackend.block.request import Op
from xenbackend.cli import log
from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.protocol.answers import Answer, code_of
from xenbackend.protocol.codes import Code

BEGAN_NS = 1_700_000_000_000_000_000
ENTRIES = [
    Entry(BEGAN_NS, 0, 4096, 20_000, 0, Op.READ),
    Entry(BEGAN_NS + 10**9, 4096, 4096, 7_000_000, 0, Op.WRITE),
    Entry(BEGAN_NS + 2 * 10**9, 8192, 512, 30_000, 5, Op.WRITE),
    Entry(BEGAN_NS + 3 * 10**9, 0, 0, 90_000, 0, Op.FLUSH),
]


def run(*arguments: str) -> int:
    """Run the command as `main` would."""
    parser = argparse.ArgumentParser()
    log.register(parser.add_subparsers())
    parsed = parser.parse_args(["log", *arguments])
    return int(parsed.run(parsed))


class Service:
    """A control socket whose only verb goes to the layers of one chain."""

    def __init__(self, path: Path) -> None:
        self.machine = Machine()
        self.chain: Chain = self.machine.open("log:|ram:1M", checked=False)
        self.asked: list[list[str]] = []
        self._control = Control(path, self._answer)
        self.path = self._control.path

    def write(self, sector: int, count: int) -> None:
        """Let the guest write."""
        self.machine.do(self.chain, write(sector * 512, b"x" * (count * 512)))

    def close(self) -> None:
        """Stop serving."""
        self._control.close()
        self.chain.close()
        self.machine.close()

    def _answer(self, request: dict[str, Any]) -> Answer:
        self.asked.append([request["command"], *request["arguments"]])
        if (request["verb"], request["vbd"]) != ("command", "5/xvda"):
            return Answer(Code.INVALID, sentence=f"there is no disk {request['vbd']}")
        try:
            data = self.chain.control(request["layer"], request["command"], request["arguments"])
        except XenbackendError as error:
            return Answer(code_of(error), sentence=str(error), order=17)
        return Answer(Code.OK, data.decode("latin-1"), order=17)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Return a running service with a disk of 1 MiB to which nothing was written."""
    service = Service(tmp_path / "socket")
    yield service
    service.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a record file with one session, the four entries and a loss."""
    path = tmp_path / "guest.rec"
    session = record.pack_session(Session(1 << 20, BEGAN_NS, 512, 1))
    path.write_bytes(session + b"".join(map(record.pack_request, ENTRIES)) + record.pack_lost(Lost(BEGAN_NS, 3)))
    return path


def shown(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """Return the JSON lines that were printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_show_prints_a_line_per_request(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line has operation, sectors, latency and the name of the error; lost records have a line too."""
    assert 0 == run("show", str(file))
    lines = [line[32:].split() for line in capsys.readouterr().out.splitlines()]

    assert ["read", "0", "8", "20", "us", "ok"] == lines[1]
    assert ["write", "16", "1", "30", "us", "EIO"] == lines[3]
    assert ["3", "records", "are", "missing", "here"] == lines[5]


def test_a_time_that_was_printed_is_one_to_begin_at(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A printed time has its zone, so it can be given to `--since` on any host."""
    run("show", str(file))
    printed = capsys.readouterr().out.splitlines()[3].split()[0]
    run("show", str(file), "--since", printed)
    again = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert ENTRIES[2].time_ns == round(datetime.fromisoformat(printed).timestamp() * 1e6) * 1000
    assert datetime.fromisoformat(printed).utcoffset() is not None
    assert printed == again[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [0, 1, 2, 3]),
        (("--op", "write"), [1, 2]),
        (("--op", "write", "--op", "flush"), [1, 2, 3]),
        (("--sectors", "8-15"), [1]),
        (("--sectors", "16-16"), [2]),
        (("--errors",), [2]),
        (("--slower-than", "5ms"), [1]),
        (("--since", "2023-11-14T22:13:22+00:00"), [2, 3]),
        (("--since", "2023-11-15T03:43:22+05:30"), [2, 3]),
        (("--since", "10s"), []),
        (("--head", "2"), [0, 1]),
        (("--tail", "3"), [2, 3]),
    ],
)
def test_show_filters(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: list[int]
) -> None:
    """Each filter selects the requests that it names; a loss is always shown, and counts as a line."""
    assert 0 == run("show", str(file), "--json", *arguments)
    values = [each for each in shown(capsys) if "lost" not in each]

    assert [ENTRIES[place].time_ns for place in expected] == [each["time_ns"] for each in values]


def test_show_values(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has sectors of 512 bytes, nanoseconds and the errno."""
    run("show", str(file), "--json", "--errors")

    assert {
        "time_ns": BEGAN_NS + 2 * 10**9,
        "op": "write",
        "first_sector": 16,
        "sectors": 1,
        "latency_ns": 30_000,
        "status": 5,
    } == shown(capsys)[0]


def test_show_reads_rotated_files_in_order(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotated files are read as one sequence."""
    run("show", str(file), str(file), "--json", "--op", "read")

    assert [BEGAN_NS, BEGAN_NS] == [each["time_ns"] for each in shown(capsys) if "lost" not in each]


def test_summary(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums are printed as a table for people, and as one object for scripts."""
    run("show", str(file), "--summary")
    table = capsys.readouterr().out
    run("show", str(file), "--summary", "--json")
    (values,) = shown(capsys)

    assert "write" in table
    assert "3 records lost" in table
    assert (2, 1, 4608) == tuple(values["operations"]["write"][key] for key in ("requests", "errors", "bytes"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sectors", "9-8"), "--sectors 9-8 is not a range of sectors"),
        (("--sectors", "x"), "--sectors x is not a range of sectors"),
        (("--since", "later"), "--since later is neither a time"),
        (("--slower-than", "slow"), "--slower-than: 'slow' is not a duration"),
    ],
)
def test_show_refuses_what_it_cannot_mean(file: Path, arguments: tuple[str, str], sentence: str) -> None:
    """A filter that cannot be understood is refused in a sentence that names it."""
    with pytest.raises(ConfigError, match=sentence):
        run("show", str(file), *arguments)


@pytest.mark.parametrize("content", [b"something else", None])
def test_show_refuses_other_files(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing or not a record is named in the refusal."""
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="other: "):
        run("show", str(path))


def test_get_acknowledges_what_it_has_written_out(service: Service, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """`get` prints the ranges and acknowledges them to the layer; the next `get` prints nothing."""
    service.write(8, 3)
    first = run("get", "5/xvda", "--socket", service.path), capfdbinary.readouterr().out
    second = run("get", "5/xvda", "--socket", service.path), capfdbinary.readouterr().out

    assert ((0, b"8 3\n"), (0, b"")) == (first, second)
    assert [["get"], ["get"]] == [each[:1] for each in service.asked if len(each) == 1]
    assert 1 == len([each for each in service.asked if len(each) == 2])


def test_get_that_cannot_print_acknowledges_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the output cannot take a page, its ranges stay dirty."""
    service.write(8, 3)
    full = Path("/dev/full").open("wb")  # noqa: SIM115 - to close it fails too
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=full))
    with pytest.raises(OSError, match="No space left"):
        run("get", "5/xvda", "--socket", service.path)
    with suppress(OSError):
        full.close()

    assert b"8 3\nend\n" == service.chain.control("log", "peek", [])


def test_peek_for_scripts(service: Service, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """JSON has a line per range; binary has blktap2's 16-byte ranges and ends with zeros."""
    service.write(8, 3)
    service.write(100, 1)
    run("peek", "5/xvda", "--socket", service.path, "--json")
    lines = capfdbinary.readouterr().out.splitlines()
    run("peek", "5/xvda", "--socket", service.path, "--binary")
    binary = capfdbinary.readouterr().out

    assert [{"first_sector": 8, "sectors": 3}, {"first_sector": 100, "sectors": 1}] == [
        json.loads(line) for line in lines
    ]
    assert [(8, 3, 0), (100, 1, 0), (0, 0, 0)] == list(struct.iter_unpack("<QII", binary))


def test_binary_splits_what_its_count_cannot_hold() -> None:
    """A range of more than 2**32 - 1 sectors becomes several, aligned to 4 KiB."""
    pieces = list(struct.iter_unpack("<QII", log._binary(8, 1 << 32)))

    assert [(8, 0xFFFF_FFF8, 0), (0x1_0000_0000, 8, 0)] == pieces


def test_verbs_print_the_status(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """`stop`, `start`, `clear` and `status` answer with the layer's status, for people and for scripts."""
    run("stop", "5/xvda", "--socket", service.path)

    assert capsys.readouterr().out.startswith("tracking off\n")
    run("status", "5/xvda", "--socket", service.path, "--json", "--layer", "0")
    (values,) = shown(capsys)
    assert ("off", 512, 1 << 20) == (values["tracking"], values["granularity"], values["size"])


def test_unknown_vbd_is_a_sentence(service: Service) -> None:
    """A refusal of the service is printed in the service's own words."""
    with pytest.raises(XenbackendError, match="there is no disk 6/xvda"):
        run("peek", "6/xvda", "--socket", service.path)
