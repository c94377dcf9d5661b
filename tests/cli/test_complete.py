"""The candidates for the last word of a command line."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.block.drivers import BUILT_IN
from xenbackend.cli import complete
from xenbackend.cli.complete import Typed, candidates, read_line
from xenbackend.cli.main import MODULES
from xenbackend.protocol.client import DEFAULT_SOCKET


def of(*words: str) -> list[str]:
    """Return the candidates for the last word."""
    return candidates(words, MODULES)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["stat"], ["status"]),
        (["--ver"], ["--version"]),
        (["help", "stat"], ["status"]),
        (["status", "--wa"], ["--watch"]),
        (["status", "--sort", "rest"], ["restarts"]),
        (["status", "--sort=rest"], ["--sort=restarts"]),
        (["config", "s"], ["show"]),
        (["config", "show", "--def"], ["--defaults"]),
        (["image", "che"], ["check"]),
        (["image", "create", "qco"], ["qcow", "qcow2"]),
        (["image", "info", "vh"], ["vhd:", "vhdx:"]),
        (["log", "peek", "--js"], ["--json"]),
        (["check", "log:|ai"], ["log:|aio:"]),
        (["check", "--read-only", "log:|ai"], ["log:|aio:"]),
        (["set", "5/xvda", "--timeout", "5", "ra"], ["ram:"]),
        (["drivers", "thro"], ["throttle"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["nosuch", ""], []),
        (["config", "show", "x"], []),
        (["status", "--interval", ""], []),
    ],
)
def test_commands_options_and_what_they_take(words: list[str], found: list[str]) -> None:
    """Candidates come from the parser of the command that the line names; a value belongs to the option before it."""
    offered = of(*words)

    assert set(found) <= set(offered)
    assert bool(found) == bool(offered)
    assert all(each.startswith(words[-1]) for each in offered)


def test_every_command_and_driver_is_offered() -> None:
    """All commands and all drivers are candidates for an empty word."""
    assert {*MODULES, "help"} <= set(of(""))
    assert set(BUILT_IN) <= set(of("drivers", ""))


@pytest.mark.parametrize("command", [each for each in MODULES if each != "xl"])
def test_every_command_has_its_options(command: str) -> None:
    """Every command offers its options; options that its help hides are not offered."""
    assert "--help" in of(command, "--")


def test_disks_are_the_services(tmp_path: Path) -> None:
    """Disks are offered by number and by guest name, as the named service lists them, if they begin with the word."""
    with answering(tmp_path / "x", working) as control:
        assert ["5/xvda", "mail/xvda"] == of("pause", "--socket", control.path, "")
        assert ["5/xvda"] == of("status", f"--socket={control.path}", "5")
        assert ["mail/xvda"] == of("set", "--socket", control.path, "m")
        assert {"status"} == {each["verb"] for each in control.asked}


def test_a_service_that_says_nothing_is_not_waited_for(tmp_path: Path) -> None:
    """Completion gives up quickly if the service hangs or does not run."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "x"))
        silent.listen()
        begun = time.monotonic()
        assert [] == of("pause", "--socket", str(tmp_path / "x"), "")
        assert [] == of("pause", "--socket", str(tmp_path / "none"), "")

    assert time.monotonic() - begun < 3.0


def test_files_for_what_takes_files(tmp_path: Path) -> None:
    """Arguments that take files complete to files; arguments that take directories, only to directories."""
    (tmp_path / "vm.cfg").touch()
    (tmp_path / "vms").mkdir()

    assert [f"{tmp_path}/vm.cfg", f"{tmp_path}/vms/"] == of("convert", f"{tmp_path}/vm")
    assert [f"{tmp_path}/vms/"] == of("install", "--root", f"{tmp_path}/vm")
    assert f"--config={tmp_path}/vm.cfg" in of("run", f"--config={tmp_path}/vm")


def test_the_services_socket_is_the_commands_default() -> None:
    """Without --socket, the command's default socket is asked, also for nested commands."""
    from xenbackend.cli import log, status
    from xenbackend.cli.arguments import Parser

    for module, words in ((status, ["status"]), (log, ["log", "peek"])):
        commands = Parser().add_subparsers()
        module.register(commands)
        assert DEFAULT_SOCKET == complete._socket_of(words, commands.choices[words[0]])


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        ("x check 'log:|ai", Typed(["x", "check", "log:|ai"], "'", 0)),
        ("x check aio:/im", Typed(["x", "check", "aio:/im"], "", 4)),
        ("x check log:\\|aio:/a\\ b", Typed(["x", "check", "log:|aio:/a b"], "", 9)),
        ('x a"b c" "d\\"e\\f', Typed(["x", "ab c", 'd"e\\f'], '"', 0)),
        ("x aio:'/a b", Typed(["x", "aio:/a b"], "'", 4)),
        ("x '' ", Typed(["x", "", ""], "", 0)),
        ("x --sort=", Typed(["x", "--sort="], "", 7)),
        ("x a\\", Typed(["x", "a"], "", 0)),
        ("", Typed([""], "", 0)),
    ],
)
def test_a_shells_line(line: str, typed: Typed) -> None:
    """A line is split as a shell splits it, up to the cursor, even inside an open quote."""
    assert typed == read_line(line, " \t\n\"'><=;|&(:")
