"""The demo, as its user runs it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own."""
    command = [sys.executable, "-m", "xenbackend", "demo", "--seconds", "0.2", "--area", "4M", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


@pytest.mark.slow
def test_a_file_system_survives_the_demo(tmp_path: Path) -> None:
    """A disk with ext4 on it is verified, and is afterwards, for e2fsck and byte by byte, what it was before; the guest
    read the same.
    """
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
    """Without an argument it makes a disk of its own, and shows xenstore changing and what `log:` saw."""
    done = demo()

    assert done.returncode == 0, done.stderr
    assert "/local/domain/0/backend/vbd/1/51712/state = 4 Connected" in done.stdout
    assert "/local/domain/1/device/vbd/51712/state = 6 Closed" in done.stdout
    assert "log: saw 1 written range, 4 MiB" in done.stdout


@pytest.mark.slow
def test_interrupted_it_puts_the_disk_back(tmp_path: Path) -> None:
    """Ctrl-C in the midst of writing ends with 130, the disk as it was, and no process left."""
    image = tmp_path / "disk.img"
    before = bytes(range(256)) * (8 << 12)
    image.write_bytes(before)
    command = [sys.executable, "-u", "-m", "xenbackend", "demo", "--seconds", "60", "--area", "4M", f"aio:{image}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "it begins to write" in line:
            break
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    service = next(line for line in said if "the service (pid " in line).split("(pid ")[1].split(")")[0]

    assert process.returncode == 130, rest
    assert image.read_bytes() == before
    assert not Path(f"/proc/{service}").exists()


@pytest.mark.slow
def test_a_disk_that_lies_is_found() -> None:
    """Data that do not come back end with 1 and a sentence that says what was there instead."""
    done = demo("--quiet", "null:4M")

    assert done.returncode == 1
    assert "holds zeros where generation" in done.stderr
    assert "Traceback" not in done.stderr
