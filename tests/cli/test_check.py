"""The command check."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers_block import image
from xenbackend.block.chain import open_chain, parse_chain
from xenbackend.cli import check
from xenbackend.cli.main import main
from xenbackend.errors import ChainError, ConfigError, DriverError
from xenbackend.kernel import blockdev
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.files import HostFiles


def run(*words: str) -> int:
    """Run the command as main does."""
    parser = argparse.ArgumentParser()
    check.register(parser.add_subparsers())
    arguments = parser.parse_args(["check", *words])
    return int(arguments.run(arguments))


def served(text: str) -> None:
    """Open and close a chain as a worker that no guest needs."""
    reactor = Reactor()
    files = HostFiles(reactor)
    open_chain(parse_chain(text), EnvFactory(reactor, files, serves=True), read_only=False).close()
    files.close()
    reactor.close()


def test_a_chain_is_explained_layer_by_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The table names each layer with its size, abilities and what it reported."""
    path = image(tmp_path / "i")

    assert run(f"delay:read=5ms|aio:{path},cache=on") == 0
    output = capsys.readouterr().out
    for word in ("delay:read=5ms", "1 MiB", "read,", "write,", "flush", "page"):
        assert word in output


def test_a_whole_disk_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A whole disk line is opened as for the guest, and what belongs in the guest's configuration is printed."""
    path = image(tmp_path / "i")

    assert 0 == run("--disk", f"tap2:log:|aio:{path},xvda,r")
    words = capsys.readouterr().out
    assert "write" not in words
    assert f"disk = ['vdev=xvda,access=ro,script=block-xenbackend,target=log:|aio:{path}']" in words
    assert 0 == run("--disk", "--json", f"tap2:aio:{path},xvdb,w")
    values = json.loads(capsys.readouterr().out)
    assert ("xvdb", f"aio:{path}") == (values["vdev"], values["chain"])


def test_what_is_no_part_of_a_chain_is_no_mistake_of_a_driver(tmp_path: Path) -> None:
    """A whole disk line pasted as a chain is not blamed on an option; the error names the command that accepts it."""
    line = f"tap2:log:|aio:{tmp_path}/i,xvda,w"
    with pytest.raises(ConfigError, match="',xvda,w' is not part of the chain") as caught:
        run(line)
    assert f"xenbackend check --disk '{line}'" in str(caught.value)
    with pytest.raises(ChainError, match="'wrong' is not key=value"):
        run(f"aio:{tmp_path}/i,wrong")


def test_sectors_are_shown_as_fdisk_shows_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the medium writes larger units than a sector, both sizes are shown."""
    monkeypatch.setattr(blockdev, "_unit_of_file", lambda _fd: 4096)
    path = image(tmp_path / "i")

    assert run(f"aio:{path}") == run("--json", f"aio:{path}") == 0
    assert "512 / 4096" in (output := " ".join(capsys.readouterr().out.split()))
    assert '"physical_sector_size": 4096' in output


def test_json_has_the_facts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With --json one object is printed, with the layers top first; --read-only shows in it."""
    path = image(tmp_path / "img")

    assert run("--json", "--read-only", f"tap2:delay:|aio:{path}") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chain"] == f"delay:|aio:{path}"
    assert ["delay:", f"aio:{path}"] == [layer["layer"] for layer in report["layers"]]
    assert [(1 << 20, True)] * 2 == [(layer["size"], layer["read_only"]) for layer in report["layers"]]
    assert "mode" in report["layers"][1]["facts"]


def test_what_is_wrong_is_raised_for_the_operator(tmp_path: Path) -> None:
    """A bad chain and an image that cannot be opened end in the errors that main prints."""
    with pytest.raises(ChainError):
        run("dealy:|null:")
    with pytest.raises(DriverError, match="there is no file or device"):
        run(f"aio:{tmp_path}/none")


FILES = {
    "cow": "cow:{0}/new|aio:{0}/img",
    "checksum": "checksum:{0}/new|aio:{0}/img",
    "log": "log:{0}/new|aio:{0}/img",
    "cache": "cache:{0}/new,size=1M|aio:{0}/img",
    "writeback": "cache:{0}/new,size=1M,mode=writeback|aio:{0}/img",
    "two": "log:{0}/new|cow:{0}/other|aio:{0}/img",
}


@pytest.mark.parametrize("chain", FILES.values(), ids=FILES)
def test_a_check_creates_no_file(chain: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file that a worker would create is named, also in JSON, and not created; an empty one stays empty."""
    image(tmp_path / "img")
    text = chain.format(tmp_path)
    wanted = [f"{tmp_path}/{name}" for name in (["other"] * ("other" in text) + ["new"] + ["new.1"] * ("log:" in text))]

    assert run(text) == run("--json", text) == 0
    told, values = capsys.readouterr().out.split("{", 1)
    assert ["img"] == os.listdir(tmp_path)
    assert [f"creates: {each}, when the disk is attached" in told for each in wanted] == [True] * len(wanted)
    assert wanted == json.loads("{" + values)["creates"]
    (tmp_path / "new").touch()
    assert run("--json", text) == 0
    assert f"{tmp_path}/new" not in json.loads(capsys.readouterr().out)["creates"]
    assert 0 == (tmp_path / "new").stat().st_size


@pytest.mark.parametrize("chain", FILES.values(), ids=FILES)
def test_a_check_changes_no_file(chain: str, tmp_path: Path) -> None:
    """No file gets other content or another time of change, which other layers take for a change of the image."""
    image(tmp_path / "img")
    text = chain.format(tmp_path)
    served(text)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}

    assert 2 <= len(before)
    assert run(text) == run(f"aio:{tmp_path}/img") == 0
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert run(text) == 0


def test_a_check_leaves_what_another_writer_has_to_say(tmp_path: Path) -> None:
    """Opening an image for writing ends its dirty bitmaps, and checksums of a changed image; a check does neither."""
    made = tmp_path / "q"
    assert 0 == main(["image", "create", "qcow2", str(made), "1M"])
    with made.open("r+b") as file:
        file.seek(88)  # the last byte of the autoclear bits: there are bitmaps
        file.write((1).to_bytes(8, "big"))
    text = f"checksum:{tmp_path}/sums|aio:{image(tmp_path / 'img')}"
    served(text)
    os.utime(tmp_path / "img", ns=(time.time_ns() + 60 * 10**9,) * 2)
    before = made.read_bytes(), (tmp_path / "sums").read_bytes()

    assert run(f"qcow2:{made}") == run(text) == 0
    assert before == (made.read_bytes(), (tmp_path / "sums").read_bytes())


def test_whether_a_file_could_be_created(tmp_path: Path) -> None:
    """A check fails where the service would: no directory, no such file system, no room for what is reserved."""
    image(tmp_path / "img")
    with pytest.raises(DriverError, match=f"cannot be created, as there is no directory {tmp_path}/no; make it first"):
        run(f"cow:{tmp_path}/no/new|aio:{tmp_path}/img")
    with pytest.raises(DriverError, match="option file"):
        run(f"cow:/proc/new|aio:{tmp_path}/img")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with pytest.raises(DriverError, match="File too large"):
            run(f"cow:{tmp_path}/new|null:64G")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed (Debian: util-linux)")
@pytest.mark.parametrize("is_directory", [False, True])
def test_an_empty_record_file_is_judged_by_itself(tmp_path: Path, *, is_directory: bool) -> None:
    """An existing empty file that cannot be written fails the check, as it would fail the service; whether its
    directory can be written does not matter.
    """
    image(tmp_path / "img")
    (records := tmp_path / "records").mkdir()
    (records / "new").touch()
    (tmp_path / "file").touch()
    only = records if is_directory else records / "new"
    script = f"""
        mount --bind {only} {only} && mount -o remount,ro,bind {only} || exit 77
        {f"mount --bind {tmp_path}/file {records}/new || exit 77" if is_directory else ""}
        {sys.executable} -m xenbackend check 'cow:{records}/new|aio:{tmp_path}/img'
    """
    ended = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip(f"no mount for us: {ended.stderr}")

    assert is_directory == (ended.returncode == 0), ended.stdout + ended.stderr
    assert is_directory or "new is on a read-only file system" in ended.stderr


@pytest.mark.parametrize("chain", ["aio:img", "log:rec|aio:/img", "luks:key=k|aio:/img", "cow:./a=b|aio:/img"])
def test_a_relative_file_is_refused_as_by_attach(chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` refuses what `attach` refuses, with the same sentence and status: the service has another directory."""
    assert 2 == main(["attach", "5/xvdb", chain])
    theirs = capsys.readouterr().err
    assert 2 == main(["check", chain])

    assert theirs == capsys.readouterr().err
    assert "relative to the service's working directory; write the whole path, such as /" in theirs


def test_an_image_is_free_after_a_check(tmp_path: Path) -> None:
    """A check leaves no lock behind, and changes no byte."""
    path = image(tmp_path / "img")
    path.write_bytes(b"kept" * 256)
    for _ in range(2):
        assert run("--json", f"aio:{path}") == 0

    assert path.read_bytes() == b"kept" * 256


def test_an_odd_order_is_noted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A chain whose order probably does not do what was meant gets a note, in JSON too."""
    text = f"cow:{tmp_path}/cow|throttle:iops=10|aio:{image(tmp_path / 'img')}"

    assert run(text) == 0
    assert "note: throttle below cow limits only what is read" in capsys.readouterr().out
    assert run("--json", text) == 0
    assert ["throttle below cow"] == [each[:18] for each in json.loads(capsys.readouterr().out)["notes"]]


def test_any_name_can_be_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A name with control characters or invalid UTF-8 is opened unchanged and shown with escapes."""
    path = image(tmp_path / os.fsdecode(b"\xff\x1b[2J\n.img"))

    assert main(["check", f"aio:{path}"]) == 0
    output = "".join(line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "│")
    assert r"/\udcff\x1b[2J\n.img" in output


@pytest.mark.slow
def test_output_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """If the output cannot be written, as on a full disk, the command ends with status 1 and one line."""
    path = image(tmp_path / "img")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "xenbackend", "check", "--json", f"aio:{path}"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert (1, "xenbackend: No space left on device\n") == (ended.returncode, ended.stderr)
