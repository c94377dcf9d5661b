"""`xenbackend bench`: arguments to calls."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.built_once import _built_once, built  # noqa: F401 - fixtures
from xenbackend.bench.disturbance import Usage
from xenbackend.cli import bench
from xenbackend.errors import ConfigError


def parse(*arguments: str) -> argparse.Namespace:
    """Parse a command line of `xenbackend`."""
    parser = argparse.ArgumentParser()
    bench.register(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


def test_defaults() -> None:
    """Without arguments both default chains are measured, through the page cache, on a file of our own on tmpfs."""
    session = bench._session(parse())

    assert ["aio:{file}", "log:|aio:{file}"] == session.chains
    assert (Path("/dev/shm"), False, False) == (
        session.file.parent,
        session.direct,
        session.compare,
    )
    assert 9 == len(session.works)
    assert ("", False) == (session.beside, session.calls)


def test_arguments_reach_the_session(tmp_path: Path) -> None:
    """Every option reaches the session."""
    session = bench._session(
        parse("ram:{file}", "--compare", "--direct", "--file", str(tmp_path / "f"), "--size", "128M", "--work", "rr4k",
              "--seconds", "0.5", "--rounds", "3", "--poll", "20us", "--no-persistent", "--beside", "equal", "--calls")
    )  # fmt: skip

    assert (["ram:{file}"], True, True, tmp_path / "f") == (
        session.chains, session.compare, session.direct, session.file,
    )  # fmt: skip
    assert (128 << 20, ["rr4k"], 0.5, 3) == (
        session.size, [work.name for work in session.works], session.seconds, session.rounds,
    )  # fmt: skip
    assert ("equal", True) == (session.beside, session.calls)
    assert (2e-05, False, False) == (round(session.poll, 9), session.persistent, session.overwrite)


def test_a_chain_of_the_operators_gets_no_writes() -> None:
    """Without --overwrite a chain that does not use the bench file is only read."""
    assert not any(work.write for work in bench._session(parse("aio:/dev/sdx")).works)
    assert any(work.write for work in bench._session(parse("aio:/dev/sdx", "--overwrite")).works)
    with pytest.raises(ConfigError, match="this disk is read-only"):
        bench._session(parse("aio:/dev/sdx", "--work", "rw4k"))


def test_images() -> None:
    """With --image the chain is the format's driver; there are first writes if we can write that format."""
    vhd, vdi = bench._session(parse("--image", "vpc")), bench._session(parse("--image", "vdi"))

    assert (["vhd:{file}"], "vpc", True) == (vhd.chains, vhd.image, any(work.fresh for work in vhd.works))
    assert (["vdi:{file}"], "vdi", False) == (vdi.chains, vdi.image, any(work.write for work in vdi.works))


@pytest.mark.parametrize("arguments", [("--size", "much"), ("--poll", "long")])
def test_what_is_no_quantity_is_refused(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid size or time ends in argparse's usage error with our sentence."""
    with pytest.raises(SystemExit, match="2"):
        parse(*arguments)

    assert f"{arguments[1]!r} is not a" in capsys.readouterr().err


@pytest.mark.slow
def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` prints one document and nothing else on standard output."""
    args = parse("null:64M", "--work", "rr4k", "--rounds", "1", "--seconds", "0.05", "--json", "--any")

    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["target"] == "null:64M"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "foreign", "expected"), [([], 0.5, 3), (["--any"], 0.5, 0), ([], 0.05, 0)])
def test_the_exit_status_tells_whether_it_was_disturbed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    foreign: float,
    expected: int,
) -> None:
    """A disturbed session ends with status 3, or with 0 if --any is given; the figures are printed in either case."""
    usage = Usage(foreign, 0.0, 0.0, 0.0, [], autogroup=False)
    monkeypatch.setattr("xenbackend.bench.session.between", lambda *_: usage)
    args = parse("null:64M", "--work", "rr4k", "--rounds", "1", "--seconds", "0.05", *options)

    assert args.run(args) == expected
    assert (foreign > 0.1) == ("no conclusion is possible" in (out := capsys.readouterr().out))
    assert "null:64M" in out


@pytest.mark.slow
def test_table_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a table and its legend are printed."""
    args = parse("null:64M", "--work", "rr4k-1", "--rounds", "1", "--seconds", "0.05", "--any")

    assert args.run(args) == 0
    assert "4 KiB random read, depth 1" in (out := capsys.readouterr().out)
    assert "Medians over the rounds" in out
