"""The commands install and uninstall: arguments to calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend import __version__
from xenbackend.cli.main import main
from xenbackend.host.files import UNIT, items
from xenbackend.host.program import PACKAGED
from xenbackend.host.tree import Tree
from xenbackend.xl.shim import SHIM_PLACE, is_shim


@pytest.fixture
def called_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the command one that starts by itself, and return its path."""
    path = tmp_path / "bin" / "xenbackend"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho xenbackend {__version__}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(path)])
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an empty root."""
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


def test_an_image_gets_files_only(image: Path, called_as: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --root each file gets a line, no step runs, and a second run reports that nothing had to be done."""
    first = (main(["install", "--root", str(image)]), capsys.readouterr().out.splitlines())
    second = (main(["install", "--root", str(image)]), capsys.readouterr().out.splitlines())
    hint = f"to have the service started there: systemctl --root {image} enable {UNIT}"

    assert (0, 0) == (first[0], second[0])
    assert {"made"} == {line.split()[0] for line in first[1][:-1]}
    assert {"kept"} == {line.split()[0] for line in second[1][:-2]}
    assert ["everything was already in place", hint] == second[1][-2:]
    assert f"ExecStart={called_as} run" in (image / "etc/systemd/system" / UNIT).read_text()


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_nothing(image: Path) -> None:
    """If the reader closes the pipe early, the installation is still completed."""
    command = [sys.executable, "-m", "xenbackend", "install", "--root", str(image), "--packaged"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)

    assert (0, b"") == (process.returncode, said)
    assert {item.path for item in items(PACKAGED)} == {
        f"/{each.relative_to(image)}" for each in image.rglob("*") if not each.is_dir()
    }


def test_an_image_is_clean_again(image: Path, called_as: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uninstall removes everything; a second run has nothing to do."""
    main(["install", "--root", str(image)])
    statuses = [main(["uninstall", "--root", str(image)]) for _ in range(2)]

    assert [0, 2] == statuses
    assert [] == list(image.iterdir())
    assert "nothing was installed here" in capsys.readouterr().err


def test_a_dry_run_would(image: Path, called_as: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run says what would be done, and changes nothing."""
    main(["install", "--root", str(image), "--dry-run"])
    said = capsys.readouterr().out.splitlines()

    assert {"would make"} == {line.rpartition(" ")[0] for line in said[:-1]}
    assert [] == list(image.iterdir())


def test_a_packages_files_need_a_root(capsys: pytest.CaptureFixture[str]) -> None:
    """The files of a package are never written into the system that builds it."""
    assert 2 == main(["install", "--packaged", "--dry-run"])
    assert "it needs --root" in capsys.readouterr().err


def test_the_shim_is_asked_for_and_stays(image: Path, called_as: Path) -> None:
    """The shim is installed only on request, and stays until it is taken back."""
    place = image / SHIM_PLACE.lstrip("/")
    there = []
    for options in ([], ["--shim"], [], ["--no-shim"], []):
        assert 0 == main(["install", "--root", str(image), *options])
        there.append(place.exists() and is_shim(place) and f"exec {called_as} xl" in place.read_text())

    assert [False, True, True, False, False] == there


def test_an_xl_of_somebody_else_is_not_replaced(
    image: Path, called_as: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If an xl that was built from source lies at the shim's place, nothing is touched."""
    place = image / SHIM_PLACE.lstrip("/")
    place.parent.mkdir(parents=True)
    place.write_text("#!/bin/sh\n")

    assert 2 == main(["install", "--root", str(image), "--shim"])
    assert "was not installed by: xenbackend install" in capsys.readouterr().err
    assert ["usr"] == [each.name for each in image.iterdir()]


def test_a_package_is_staged(image: Path) -> None:
    """The files of a package are staged at a distribution's places and run its program; there is no manifest."""
    main(["install", "--packaged", "--root", str(image)])

    assert "ExecStart=/usr/bin/xenbackend run" in (image / "lib/systemd/system" / UNIT).read_text()
    assert not (image / "var").exists()


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_host_without_xen_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system without /etc/xen the command is refused with a hint what to write instead."""
    monkeypatch.setattr(Tree, "at", lambda _, path: tmp_path / path[1:])
    assert 2 == main([command, "--dry-run"])
    assert (
        "this is not a Xen host: there is no /etc/xen; name another system with --root DIR" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_only_root_may(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody but root is refused before anything is touched."""
    (tmp_path / "etc/xen").mkdir(parents=True)
    monkeypatch.setattr(Tree, "at", lambda _, path: tmp_path / path[1:])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert 2 == main([command, "--dry-run"])
    assert "only root may do that to this system" in capsys.readouterr().err
    assert [tmp_path / "etc/xen"] == [*(tmp_path / "etc").iterdir()]


def test_a_root_that_is_not_there_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing root directory is named in the error."""
    assert 2 == main(["install", "--root", str(tmp_path / "none")])
    assert "none: is not a directory" in capsys.readouterr().err
