"""The command run: arguments to settings; the service itself is tried in `tests/supervisor/test_main.py`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from xenbackend.cli import run
from xenbackend.cli.main import main
from xenbackend.kernel import process
from xenbackend.supervisor.service import detached, parent
from xenbackend.supervisor.service import main as service
from xenbackend.supervisor.service.settings import Settings


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were given a higher priority."""
    pids: list[int] = []
    monkeypatch.setattr(process, "boost", pids.append)
    return pids


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.register(parser.add_subparsers())
    return parser.parse_args(["run", *arguments])


def test_arguments_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurried: list[int]) -> None:
    """The command line overrides the settings file; the service gets a higher priority, as guests may be waiting."""
    config = tmp_path / "x.toml"
    config.write_text('host = "a"\nserve = "ours"\n')
    served: list[Any] = []
    monkeypatch.setattr(service, "run", lambda read, _: served.append(read()) or 0)
    args = _parse("--config", str(config), "--serve", "all", "--store", "/s")

    assert 0 == args.run(args)
    assert ([Settings(host="a", serve="all", store="/s")], [os.getpid()]) == (served, hurried)


@pytest.mark.parametrize("option", ["--keep", "--detach"])
def test_a_service_that_is_kept_is_started_with_the_same_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, hurried: list[int]
) -> None:
    """The parent starts `run` with the same arguments and absolute paths, but without --keep or --detach; no boost."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('serve = "ours"\n')
    started: list[Any] = []
    monkeypatch.setattr(parent, "run", lambda *what: started.append(what) or 0)
    monkeypatch.setattr(detached, "run_detached", lambda _, *what: started.append((["run", *what[0]], what[2:])) or 0)
    args = _parse("--config", "x.toml", "--store", "s", "--socket", "c", "--log-level", "error", option)

    assert 0 == args.run(args)
    [(arguments, *_)] = started
    assert ("run", []) == (arguments[0], hurried)
    assert {
        f"--config={tmp_path}/x.toml", f"--store={tmp_path}/s", f"--socket={tmp_path}/c", "--log-level=error"
    } == set(arguments[1:])  # fmt: skip


def test_no_process_of_the_services_takes_its_inheritance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors that systemd kept are for the service only: their variables are taken out of the environment."""
    monkeypatch.setenv("LISTEN_FDS", "1")
    given: list[Any] = []
    monkeypatch.setattr(service, "run", lambda _, environment: given.append(environment) or 0)
    args = _parse("--config", "/dev/null")

    assert 0 == args.run(args)
    assert ("1", False) == (given[0]["LISTEN_FDS"], "LISTEN_FDS" in os.environ)


def test_a_bad_file_is_the_operators_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in the settings file is exit status 2 and one sentence."""
    config = tmp_path / "x.toml"
    config.write_text("frob = 1\n")

    assert 2 == main(["run", "--config", str(config)])
    assert f"xenbackend: {config}:1: there is no setting frob" in capsys.readouterr().err


def test_check_serves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], hurried: list[int]) -> None:
    """`run --check` reports all mistakes, a line each for people and a list for scripts, or that there are none."""
    config = tmp_path / "x.toml"
    config.write_text("frob = 1\npoll_us = -1\n")
    found = (
        main(["run", "--check", "--config", str(config)]),
        main(["run", "--check", "--json", "--config", str(config)]),
    )
    said = capsys.readouterr()
    config.write_text("poll_us = 1\n")
    right = (
        main(["run", "--check", "--config", str(config)]),
        main(["run", "--check", "--json", "--config", str(config)]),
    )
    then = capsys.readouterr()

    assert (2, 2, 0, 0, []) == (*found, *right, hurried)
    assert [f"xenbackend: {config}:{line}:" for line in (1, 2, 1, 2)] == [
        " ".join(each.split()[:2]) for each in said.err.splitlines()
    ]
    values = json.loads(said.out)
    assert (2, "invalid") == (len(values["mistakes"]), values["error"]["code"])
    assert f"{config}: the settings can be used\n" in then.out
    assert [] == json.loads(then.out.splitlines()[-1])["mistakes"]
