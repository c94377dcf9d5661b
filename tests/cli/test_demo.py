"""The command demo: a disk of the operator's is tried and restored, and mistakes are reported in sentences."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import places
from xenbackend.cli.demo import ProgressBar
from xenbackend.cli.main import main
from xenbackend.embedded.exercise import Phase


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with places.directory(Path("/tmp")) as path:
        yield path


_SHORT = ("--quiet", "--seconds", "0.1", "--area", "64K")


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 4096, 5120])
def test_a_disk_of_any_size_holds_what_it_held(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk below a page, of one page, or not of whole pages is verified and restored; every request is counted."""
    image = tmp_path / "[bold].img"
    image.write_bytes(before := os.urandom(size))
    status = main(["demo", *_SHORT, "--save", str(tmp_path / "saved"), f"log:|aio:{image}"])
    output = capsys.readouterr().out

    assert (0, before, before) == (status, image.read_bytes(), (tmp_path / "saved").read_bytes())
    assert f"log:|aio:{image}" in output
    assert "answered 0 reads" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "sentence"),
    [
        ("null:1M", "the guest gave up: sector"),
        ("fault:op=read|ram:1M", "the disk answered -1 at sector 0 (save)"),
        ("fault:op=write,skip=4|ram:1M", "the disk's former content could not be restored"),
    ],
)
def test_a_disk_that_fails_is_told(chain: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If a disk loses data or fails requests, the demo ends with status 1 and one sentence, without a traceback."""
    status = main(["demo", *_SHORT, chain])
    error = capsys.readouterr().err

    assert (1, 1) == (status, len(error.splitlines()))
    assert sentence in error


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["save", "fill", "mix", "verify", "restore"])
def test_an_interrupted_disk_is_put_back(
    phase: str, short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever Ctrl-C comes, even twice, the disk's contents are restored and nothing of the machine is left."""
    image = short_path / "img"
    image.write_bytes(before := os.urandom(1 << 20))
    update = ProgressBar.update

    def interrupted(bar: ProgressBar, now: Phase) -> None:
        update(bar, now)
        if now.name == phase:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressBar, "update", interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    status = main(["demo", "--quiet", "--seconds", "0.1", "--area", "1M", f"aio:{image}"])

    assert (130 if phase != "restore" else 0, before) == (status, image.read_bytes())
    assert [image] == list(short_path.iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_mistakes_are_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An area below one sector, or an existing file to save to, ends with status 2."""
    image = tmp_path / "img"
    image.write_bytes(b"kept" * 128)

    assert 2 == main(["demo", "--area", "511", "ram:1M"])
    assert "the least is one sector" in capsys.readouterr().err
    assert 2 == main(["demo", "--save", str(image), f"aio:{image}"])
    assert "it exists; name a new file" in capsys.readouterr().err
    assert b"kept" * 128 == image.read_bytes()


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own."""
    command = [sys.executable, "-m", "xenbackend", "demo", "--seconds", "0.2", "--area", "4M", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


@pytest.mark.slow
def test_a_file_system_survives_the_demo(tmp_path: Path) -> None:
    """A disk with ext4 is verified and then unchanged, for e2fsck and byte by byte; the guest read the same bytes."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed (e2fsprogs)")
    image, copy, seen = tmp_path / "fs.img", tmp_path / "copy", tmp_path / "seen"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    shutil.copy(image, copy)
    done = demo("--quiet", "--save", str(seen), f"log:|aio:{image}")
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "verified: every sector held what the guest wrote" in done.stdout
    assert check.returncode == 0, check.stdout
    assert image.read_bytes() == copy.read_bytes() == seen.read_bytes()


@pytest.mark.slow
def test_the_demo_shows_states_and_what_the_log_saw() -> None:
    """Without an argument the demo makes its own disk; it shows what `log:` saw, and xenstore with --trace."""
    done = demo("--trace")

    assert done.returncode == 0, done.stderr
    assert "/local/domain/0/backend/vbd/1/51712/state = 4 Connected" in done.stdout
    assert "/local/domain/1/device/vbd/51712/state = 6 Closed" in done.stdout
    assert "log: saw 1 written range, 4 MiB" in done.stdout
