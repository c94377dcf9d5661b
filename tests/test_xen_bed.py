"""The host's side of the test bed for a real Xen (`tests/xen/bed`): its cache, what it needs, what it shows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.xen.bed import machine
from tests.xen.bed.__main__ import main
from tests.xen.bed.boot import Machine, command
from tests.xen.bed.image import KEPT, cached, key_of
from tests.xen.bed.report import Report


def built(cache: Path, name: str) -> Path:
    """Return a directory of the cache, made with a file in it."""
    return cached(cache, name, lambda place: (place / "file").write_text(name))


def test_an_image_is_built_once(tmp_path: Path) -> None:
    """What is in the cache is used as it is."""
    first = built(tmp_path, "image-1")
    second = cached(tmp_path, "image-1", lambda _: pytest.fail("built again"))

    assert (first, "image-1") == (second, (second / "file").read_text())


def test_a_build_that_failed_is_never_used(tmp_path: Path) -> None:
    """What an interrupted build left is not taken for an image, and the next build begins from nothing."""

    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        cached(tmp_path, "image-1", fail)

    assert ["file"] == [file.name for file in built(tmp_path, "image-1").iterdir()]


def test_old_images_go(tmp_path: Path) -> None:
    """Only the images that were used last are kept, and wheels do not count as images."""
    built(tmp_path, "wheels-1")
    for number in range(KEPT + 1):
        os.utime(built(tmp_path, f"image-{number}"), (number, number))
    built(tmp_path, "image-9")

    assert {"image-2", "image-9", "wheels-1", "lock"} == {each.name for each in tmp_path.iterdir()}


def test_a_changed_recipe_has_another_key(tmp_path: Path) -> None:
    """Each byte of each file counts, and so does a file's name."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("1")
    keys = [key_of([one]), key_of([two]), key_of([one, two])]
    one.write_text("2")

    assert 4 == len({*keys, key_of([one])})


@pytest.mark.parametrize(
    ("lacks", "uid", "builds", "says"),
    [
        ("qemu-system-x86_64", 0, False, "not installed: qemu-system-x86; try: apt-get install"),
        ("mmdebstrap", 0, True, "not installed: mmdebstrap; try: apt-get install"),
        ("", 1000, True, "only root can build one"),
    ],
)
def test_what_is_missing_is_named(lacks: str, uid: int, says: str, *, builds: bool) -> None:
    """Each tool is asked for by its Debian package; root is needed to build, not to boot."""
    assert says in machine.missing(builds=builds, which=lambda tool: None if tool == lacks else tool, uid=uid)


@pytest.mark.parametrize(("uid", "builds", "lacks"), [(0, True, ""), (1000, False, "mmdebstrap")])
def test_nothing_is_missing(uid: int, lacks: str, *, builds: bool) -> None:
    """A user with an image needs nothing of what builds one."""
    assert "" == machine.missing(builds=builds, which=lambda tool: None if tool == lacks else tool, uid=uid)


@pytest.mark.parametrize(("ci", "options", "status"), [("", [], 0), ("true", [], 1), ("", ["--must"], 1)])
def test_a_machine_that_cannot_is_skipped_or_an_error(
    ci: str, options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Without QEMU the bed says why and succeeds; in CI, or where success was promised, it fails."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "PATH", str(tmp_path))

    assert status == main([*options, "--results", str(tmp_path / "results")])
    assert "no Xen to test on: not installed:" in capsys.readouterr().out


def test_the_image_is_never_written(tmp_path: Path) -> None:
    """Dom0 writes to a snapshot of its root, and to the parcel."""
    drives = [each for each in command(Machine(tmp_path, tmp_path / "p.img", tmp_path / "c")) if "if=none" in each]

    assert [True, False] == ["snapshot=on" in drive for drive in drives]


def shown(*events: dict[str, object] | str) -> tuple[str, Report]:
    """Return what a report prints for events, and the report."""
    text = io.StringIO()
    report = Report(Console(file=text, width=120))
    for event in events:
        report.take(event if isinstance(event, str) else json.dumps(event))
    return text.getvalue(), report


def ended(outcome: str, text: str = "") -> dict[str, object]:
    """Return the event of a test that ended."""
    return {"event": "end", "test": "tests/xen/test_a.py::test[1]", "outcome": outcome, "seconds": 1.5, "text": text}


def test_each_test_has_a_line() -> None:
    """A test that passed is a line, one that was skipped says why, one that failed says everything."""
    text, _ = shown(ended("passed"), ended("skipped", "no device"), ended("failed", "assert [1] == [2]"))

    assert [
        "ok      1.5 s  tests/xen/test_a.py::test[1]",
        "skip    1.5 s  tests/xen/test_a.py::test[1]  no device",
        "FAIL    1.5 s  tests/xen/test_a.py::test[1]",
        "assert [1] == [2]",
    ] == text.splitlines()


def test_the_status_is_what_dom0_says() -> None:
    """Without a word from dom0 there is no status, and the test that was running is known; noise does no harm."""
    began = {"event": "start", "test": "test_a"}

    assert (None, "test_a") == (shown(began, "[ 12.0] Oops [0]\n")[1].status, shown(began)[1].running)
    assert (1, "") == (shown(began, ended("failed"), {"event": "exit", "status": 1})[1].status, "")
