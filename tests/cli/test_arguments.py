"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.cli.arguments import Help, disk, duration, size
from xenbackend.cli.main import MODULES, main


def test_quantities_are_read_as_everywhere_else() -> None:
    """Sizes and durations are written as in chains."""
    assert (64 << 20, 0.005, 1.5) == (size("64M"), duration("5ms"), duration("1.5"))


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [(size, "64X", "'64X' is not a size; write bytes"), (duration, "nan", "'nan' is not a duration; write a number"),
     (disk, "foo", "'foo' is not a disk; write it as 5/xvda")],
)  # fmt: skip
def test_what_is_wrong_is_said(parse: Callable[[str], object], text: str, sentence: str) -> None:
    """For a quantity that cannot be parsed, argparse prints our sentence."""
    with pytest.raises(argparse.ArgumentTypeError, match=sentence):
        parse(text)


@pytest.mark.parametrize("columns", ["40", "132", "0", "wide", None])
def test_help_is_as_wide_as_argparse_would_have_it(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The width is the one that argparse would use, found without importing shutil, which is slow to import."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)

    assert argparse.HelpFormatter("x")._width == Help("x")._width


@pytest.mark.parametrize(
    ("line", "usage", "sentence"),
    [
        ("status 5/xvda --frob", "usage: xenbackend status [", "xenbackend status: unknown arguments: --frob; see: "),
        ("stop --js", "usage: xenbackend stop [", "xenbackend stop: unknown arguments: --js; see: "),
        ("upgrade 5/xvda 6/xvda", "usage: xenbackend upgrade [", "unknown arguments: 6/xvda"),
        ("image check qcow2:a b", "usage: xenbackend image check [", "unknown arguments: b"),
        ("statsu", "usage: xenbackend [", "unknown command 'statsu'; did you mean status?; see: xenbackend --help"),
        ("--frob", "usage: xenbackend [", "xenbackend: "),
    ],
)
def test_a_command_shows_its_own_usage(
    capsys: pytest.CaptureFixture[str], line: str, usage: str, sentence: str
) -> None:
    """An unknown argument is reported with the usage of the command it was given to; options cannot be abbreviated."""
    with pytest.raises(SystemExit) as end:
        main(line.split())
    said = capsys.readouterr().err

    assert 2 == end.value.code
    assert said.startswith(usage)
    assert sentence in said


@pytest.mark.parametrize("name", MODULES)
def test_every_command_describes_itself(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """--help, before or after the command or as `help`, prints a description, and all commands but xl offer --json."""
    texts = []
    for words in ([name, "--help"], ["help", name]):
        if name != "xl":
            with pytest.raises(SystemExit):
                main(words)
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1]
    if name != "xl":
        _, _, below = texts[0].partition("\n\n")
        assert below[0].isupper()
        assert "--json" in texts[0] or "COMMAND" in texts[0]


def test_the_environment_may_name_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """XENBACKEND_SOCKET names the socket for every command; --socket overrides it, and an empty variable is ignored."""
    monkeypatch.setenv("XENBACKEND_SOCKET", str(tmp_path / "x"))
    with answering(tmp_path / "x", working):
        assert (0, 1) == (main(["orders"]), main(["orders", "--socket", str(tmp_path / "none")]))
    capsys.readouterr()
    monkeypatch.setenv("XENBACKEND_SOCKET", "")
    main(["orders"])

    assert "/run/xenbackend/control.sock" in capsys.readouterr().err
