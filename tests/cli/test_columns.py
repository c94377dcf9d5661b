"""What commands print on a terminal of 80 columns and into a pipe, and rows of words in columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.answering import DISK, ENTRY, Control, answering, working
from xenbackend.block.drivers import driver_names, find_driver, manual
from xenbackend.cli.columns import filled, lines, print_rows
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

CHAIN = "log:/var/log/guests/a-long-name.rec,limit=16M|throttle:iops=500,bps=20M,group=tenant7|aio:/srv/guest.raw"
WHOLE = {**ENTRY, "from": "aio:/srv/guest.raw", "to": CHAIN, "error": "it took [bold]longer\x1b[2J than it should"}
LAYERS = [{"layer": each, "figures": {"held": 7}} for each in CHAIN.split("|")]
TIMES = {"bytes": 10**9, "sum_ns": 10**9, "buckets": {"30": 100_000}}
COMMANDS = {
    "orders": ["orders"],
    "top": ["top", "--once", "--layers"],
    "latency": ["latency", "5/xvda", "--layers"],
}


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """A service with a long chain, whose orders and measurements are told at once."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    disk = {**deepcopy(DISK), "chain": CHAIN, "layers": LAYERS, "guest": "mail.example.org"}
    measured = [{"layer": each, "operations": {"discard": TIMES}} for each in CHAIN.split("|")]
    answers: dict[str, Any] = {
        "status": [disk], "orders": [WHOLE], "measure": {"chain": CHAIN, "seconds": 1.0, "layers": measured},
    }  # fmt: skip

    def answer(request: dict[str, Any]) -> Answer:
        known = answers.get(request["verb"])
        return working(request) if known is None else Answer(Code.OK, known, order=17)

    with answering(tmp_path / "x", answer) as made:
        yield made


def be_terminal(patch: pytest.MonkeyPatch) -> None:
    """Let standard output be a terminal of 80 columns from now on."""
    patch.setenv("COLUMNS", "80")
    patch.setenv("TERM", "dumb")
    patch.setattr("sys.stdout.isatty", lambda: True, raising=False)


def together(text: str) -> str:
    """Return a text without its white space: what was folded is whole again, if nothing stands beside it."""
    return "".join(text.split())


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_line_fits_into_the_terminal(
    words: list[str], control: Control, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal no line is wider than it is, nothing is cut, and no text moves the cursor or is taken for style."""
    be_terminal(monkeypatch)
    assert 0 == main([*words, "--socket", control.path])
    out = capsys.readouterr().out

    printed = out.splitlines()[words[0] == "latency" :]  # whose first line has the chain, to be copied as one
    assert max(map(len, printed)) <= 80
    assert "…" not in out
    assert "\x1b" not in out
    assert "group=tenant7" in together(out)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_nothing_is_folded_in_a_pipe(
    words: list[str], control: Control, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the width of a terminal elsewhere, a script finds each row in one line, with all of the chain."""
    monkeypatch.setenv("COLUMNS", "40")
    assert 0 == main([*words, "--socket", control.path])

    assert CHAIN in (out := capsys.readouterr().out)
    assert "\x1b" not in out


@pytest.mark.parametrize("name", [each for each in driver_names() if not each.startswith("xor-")])
def test_a_manual_fits_into_the_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the paragraphs of a manual are filled anew, not its chains; into a pipe it goes as it is."""
    whole = manual(find_driver(name))
    assert 0 == main(["drivers", name])
    assert whole + "\n" == capsys.readouterr().out
    be_terminal(monkeypatch)
    assert 0 == main(["drivers", name])
    out = capsys.readouterr().out

    assert max(len(line) for line in out.splitlines() if len(line.split()) > 1) <= 80
    assert whole.replace("[,", " [,").split() == out.replace("[,", " [,").split()


def test_only_what_is_prose_is_filled() -> None:
    """A paragraph is filled with its indentation; a list keeps its lines; a chain is never broken."""
    text = "a: b\n\nDescription:\n    one two three four five\n    six seven\n\n    x\n    y two three four five\n"
    chains = "\nExample:\n    log:|aio:/img\n    log:/a/b/c,limit=16M|throttle:iops=500|aio:/srv/a/guest.raw or so\n"

    assert [
        "a: b", "", "Description:", "    one two three", "    four five six", "    seven", "", "    x",
        "    y two three four", "    five", "", "Example:", "    log:|aio:/img",
        "    log:/a/b/c,limit=16M|throttle:iops=500|aio:/srv/a/guest.raw", "        or so", "",
    ] == filled(text + chains, 20).split("\n")  # fmt: skip


def test_rows_of_words_are_lines_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Words stand below their headings, aligned right where told, and lines without words are no trouble."""
    rows = [("a", "number", "c"), ("word", "7", "")]

    assert ["a     number  c", "word       7", "below"] == list(lines(rows, right=(1,), below=[[], ["below"]]))
    print_rows(rows[:1], [(0, 1), (2,)])
    assert "a  number  c\n" == capsys.readouterr().out
