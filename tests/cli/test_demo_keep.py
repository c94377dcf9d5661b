"""`xenbackend demo --keep`: a host to play with."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import places
from tests.cli.test_json import documented, keys
from xenbackend.cli import demo_keep
from xenbackend.cli.main import main
from xenbackend.errors import ConfigError

pytestmark = pytest.mark.slow
PROGRAM = (sys.executable, "-m", "xenbackend")
PATIENCE_S = 30.0


class Host:
    """A host that keeps running, and a terminal in which its variables are set."""

    def __init__(self, process: subprocess.Popen[str], values: dict[str, Any], directory: Path) -> None:
        self.process, self.values = process, values
        self._environment = {
            **os.environ, "XENBACKEND_SOCKET": values["socket"], "XENSTORED_PATH": values["store"],
            "TMPDIR": str(directory),
        }  # fmt: skip

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in that terminal."""
        command = [*PROGRAM, *words]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60, check=False)

    def status(self, disk: str) -> dict[str, Any]:
        """Return what the service knows of a disk, empty if there is none."""
        found = self.run("status", disk, "--json")
        return json.loads(found.stdout)["vbds"][0] if found.returncode == 0 else {}

    def until(self, disk: str, **expected: Any) -> None:
        """Wait until a disk has these values. Raises: AssertionError."""
        end = time.monotonic() + PATIENCE_S
        while {key: self.status(disk).get(key) for key in expected} != expected:
            assert time.monotonic() < end, self.status(disk)


@contextmanager
def host(*words: str) -> Iterator[tuple[Host, Path]]:
    """Run a host with its own directory for temporary files while the block lasts."""
    with places.directory(Path("/tmp")) as directory:
        process = subprocess.Popen(
            [*PROGRAM, "demo", "--keep", *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TMPDIR": str(directory)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            yield Host(process, json.loads(line), directory), directory
        finally:
            process.kill()
            process.communicate()


def test_every_command_works_there_and_nothing_is_left() -> None:
    """The manual's commands work there while guests run; Ctrl-C ends the host in order and leaves nothing."""
    with host("2") as (there, directory):
        assert documented("demo --keep")[0] == keys(there.values, set())
        assert ["5/xvda", "6/xvda"] == [each["vbd"] for each in there.values["vbds"]]
        there.until("guest/xvda", state="Connected")
        for words in (
            ["status"], ["top", "--once", "--interval", "1"], ["metrics"], ["doctor"], ["pause", "6/xvda"],
            ["resume", "guest2/xvda"], ["policy", "5/xvda", "enospc=report"], ["orders"],
            ["attach", "5/xvdb", "ram:8M"], ["snapshot", "5/xvda", f"{directory}/monday.qcow2"],
        ):  # fmt: skip
            done = there.run(*words)
            assert 0 == done.returncode, (words, done.stderr, done.stdout)
        there.until("5/xvdb", state="Connected")
        assert 0 == there.run("detach", "5/xvdb").returncode
        assert "qcow2:" in there.status("5/xvda")["chain"]
        before = there.status("6/xvda")["counters"]["reads"]
        end = time.monotonic() + PATIENCE_S
        while there.status("6/xvda")["counters"]["reads"] <= before:
            assert time.monotonic() < end
        there.process.send_signal(signal.SIGINT)
        assert 0 == there.process.wait(60)
        left = [each.name for each in directory.iterdir() if each.suffix != ".qcow2"]

    assert [] == left


def test_a_host_whose_service_is_stopped_ends() -> None:
    """The demo ends when its service is stopped, even if a guest is paused."""
    with host() as (there, directory):
        there.until("5/xvda", state="Connected")
        assert 0 == there.run("pause", "5/xvda").returncode
        assert 0 == there.run("stop").returncode
        assert 0 == there.process.wait(60)

        assert [] == list(directory.iterdir())


def test_images_that_are_missing_are_made(tmp_path: Path) -> None:
    """Missing images are created, one for each guest, of the requested size; existing images are used unchanged."""
    (tmp_path / "1.img").write_bytes(bytes(2 << 20))
    with host("2", f"aio:{tmp_path}/{{n}}.img", "--area", "3M") as (there, _):
        there.until("6/xvda", state="Connected")
        there.process.send_signal(signal.SIGTERM)
        assert 0 == there.process.wait(60)

    assert [2 << 20, 3 << 20] == [(tmp_path / f"{number}.img").stat().st_size for number in (1, 2)]


@pytest.mark.parametrize("found", ["none", "this", "another"])
def test_the_program_is_found_in_another_terminal(found: str) -> None:
    """The printed lines include the program's directory as a shell in another directory takes it, unless a shell finds
    this very program already.
    """
    scripts = Path(sys.executable).parent
    others = [each for each in os.environ["PATH"].split(":") if not (Path(each) / "xenbackend").exists()]
    with places.directory(Path("/tmp")) as directory:
        (directory / "a place").symlink_to(scripts)
        shutil.copy("/bin/true", directory / "xenbackend")
        first = {"none": [], "this": [str(scripts)], "another": [str(directory)]}[found]
        process = subprocess.Popen(
            ["a place/xenbackend", "demo", "--keep"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=directory, env={**os.environ, "TMPDIR": str(directory), "PATH": ":".join([*first, *others])},
        )  # fmt: skip
        try:
            assert process.stderr is not None
            assert process.stderr.readline()  # which follows what is to be pasted
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate()

    lines = [line.removeprefix("export ") for line in output.splitlines()]
    expected = ["XENBACKEND_SOCKET", "XENSTORED_PATH", *([] if found == "this" else ["PATH"])]
    assert expected == [line.partition("=")[0] for line in lines], errors
    assert found == "this" or f"PATH='{directory}/a place':$PATH" == lines[-1]


@pytest.mark.parametrize("words", [["--keep", "0"], ["--keep", "65"], ["--keep", "2", "ram:1M"], ["--keep", "1", "x:"]])
def test_mistakes_are_told_before_anything_starts(words: list[str]) -> None:
    """Too many guests, one disk for several guests, or an invalid chain is refused before anything starts."""
    assert 2 == main(["demo", *words])


def test_a_device_that_is_missing_is_not_made(tmp_path: Path) -> None:
    """A missing device in /dev is not replaced by a file, and nothing is created in a missing directory."""
    assert 2 == main(["demo", "aio:/dev/xenbackend-none/x"])
    assert not Path("/dev/xenbackend-none").exists()
    assert 2 == main(["demo", f"aio:{tmp_path}/none/x"])
    with pytest.raises(ConfigError, match="from 1 to 64"):
        demo_keep.check(argparse.Namespace(keep=65, chain=None))
