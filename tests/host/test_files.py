"""What is installed, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend.host.files import Item, items
from xenbackend.host.program import PACKAGED, Program
from xenbackend.settings_file import PATH
from xenbackend.supervisor.service.settings import Settings

VENV = Program("/opt/x/bin/xenbackend", "/opt/x/bin/python3")


def item(program: Program, name: str) -> Item:
    """Return the item whose path ends so."""
    return next(each for each in items(program) if each.path.endswith(f"/{name}"))


def test_every_script_that_is_served_is_installed() -> None:
    """Each script name in the settings is an installed hotplug script: ours, or a link to it."""
    scripts = {name: item(VENV, name) for name in Settings().scripts}

    assert {f"/etc/xen/scripts/{name}" for name in scripts} == {each.path for each in scripts.values()}
    assert ["block-xenbackend"] == [each.link for each in scripts.values() if each.link]
    assert 0o755 == scripts["block-xenbackend"].mode


@pytest.mark.parametrize("program", [VENV, PACKAGED])
def test_the_files_run_the_program_that_installs(program: Program) -> None:
    """The hotplug script runs on our interpreter in isolated mode, and the unit runs our command."""
    script, unit = item(program, "block-xenbackend"), item(program, "xenbackend.service")

    assert f"#!{program.python} -IS".encode() == script.content.split(b"\n")[0]
    assert [f"ExecStart={program.command} run --log journal"] == [
        line for line in unit.content.decode().splitlines() if line.startswith("ExecStart=")
    ]


def test_the_script_runs(tmp_path: Path) -> None:
    """The installed hotplug script runs: `remove` ends with success."""
    script = tmp_path / "block-xenbackend"
    script.write_bytes(item(Program("/x/xenbackend", sys.executable), script.name).content)
    script.chmod(0o755)

    assert 0 == subprocess.run([script, "remove"], check=False, env={"XENBUS_PATH": "backend/vbd/1/51712"}).returncode


def test_an_admins_files_lie_in_etc_a_packages_do_not() -> None:
    """A package's files lie outside /etc, where they can be overridden, except Xen's scripts and the settings."""
    assert all(each.path.startswith("/etc/") for each in items(VENV))
    assert {"/etc/xen/scripts/block-xenbackend", "/etc/xen/scripts/tap2", str(PATH)} == {
        each.path for each in items(PACKAGED) if each.path.startswith("/etc/")
    }


def test_only_the_settings_are_the_admins() -> None:
    """Only the settings file is for editing; an install rewrites all others."""
    assert [str(PATH)] == [each.path for each in items(VENV) if each.is_config]
