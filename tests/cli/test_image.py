"""The command image, as main runs it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import qemu
from tests.driven import WorkerProcess
from tests.image_content import disk_write, leak
from tests.qcow_images import qcow2
from tests.qemu import qemu_img
from tests.until import until
from xenbackend.cli.main import main
from xenbackend.protocol.messages import Stage

MIB = 1 << 20
Run = Callable[..., tuple[int, str, str]]
RunJson = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a verb in the test's directory and returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run_it(*words: str) -> tuple[int, str, str]:
        status = main(["image", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_it


@pytest.fixture
def run_json(run: Run) -> RunJson:
    """Return a function that runs a verb, which must succeed, and parses its output."""

    def run_it(*words: str) -> Any:
        status, out, err = run(*words, "--json")
        assert status == 0, err
        values = json.loads(out)
        assert isinstance(values, list) or 1 == values.pop("version")  # `map` has the array of qemu-img
        return values

    return run_it


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Return a raw image."""
    path = tmp_path / "disk.raw"
    path.write_bytes(Random(1).randbytes(MIB).ljust(4 * MIB, b"\0"))
    return path


def test_a_file_becomes_a_guests_disk_and_a_file_again(run_json: RunJson, raw: Path, tmp_path: Path) -> None:
    """The whole way: convert, snapshot, commit, resize, convert back, and QEMU agrees at the end."""
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "a.qcow2")
    assert run_json("convert", "qcow2:a.qcow2", "vhd:b.vhd")["size"] == 4 * MIB
    leaf = run_json("snapshot", "vhd:b.vhd", "leaf.vhd")
    assert leaf == {"text": "vhd:leaf.vhd", "size": 4 * MIB, "parent": "vhd:b.vhd"}
    assert run_json("commit", leaf["text"])["written"] == 0
    assert run_json("resize", "vhd:b.vhd", "8M") == {"image": "vhd:b.vhd", "before": 4 * MIB, "size": 8 * MIB}
    run_json("convert", "vhd:b.vhd", "qcow2:c.qcow2", "--cluster-size", "4K")

    os.truncate(raw, 8 * MIB)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, tmp_path / "c.qcow2")
    assert json.loads(qemu_img("info", "--output=json", tmp_path / "c.qcow2"))["cluster-size"] == 4096


def test_commit_says_what_a_parent_with_a_data_file_needs(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    """`--into` takes the layer that the refusal names."""
    (tmp_path / "base").write_bytes(qcow2(MIB, data_name=b"data"))
    (tmp_path / "data").write_bytes(bytes(MIB))
    disk_write(run_json("snapshot", "qcow2:base,data_file=data", "leaf")["text"], {0: b"c" * 512})
    status, _, sentence = run("commit", "qcow2:leaf")
    assert (2, bytes(MIB)) == (status, (tmp_path / "data").read_bytes())
    into = sentence.strip().partition("; if that file belongs to it, add --into ")[2]
    assert f"qcow2:{tmp_path}/base,data_file={tmp_path}/data" == into
    assert into == run_json("commit", "qcow2:leaf", "--into", into)["parent"]

    assert b"c" * 512 == (tmp_path / "data").read_bytes()[:512]


def test_create_makes_what_it_says(run: Run, run_json: RunJson, raw: Path, tmp_path: Path) -> None:
    """The printed text is a layer that can be attached unchanged, if the file was given by its whole name."""
    assert run("create", "vhd", "new.vhd", "1G")[:2] == (0, "vhd:new.vhd: 1 GiB\n")
    made = run_json("create", "qcow", "child", "--parent", "disk.raw", "--parent-format", "raw")
    assert made["text"] == "qcow:child,parent_format=raw"
    made = run_json("create", "qcow", f"{tmp_path}/other", "--parent", "disk.raw", "--parent-format", "raw")
    assert main(["check", "--json", made["text"]]) == 0  # an attached file has a whole name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["create", "qcow2", "disk.raw", "1G"], "exists already"),
        (["create", "qcow2", "new"], "needs a size"),
        (["create", "qcow2", "new", "--parent", "disk.raw"], "add --parent-format raw, vhd"),
        (["info", "none"], "No such file"),
        (["check", "aio:disk.raw"], "write one of vhd:FILE, qcow2:FILE, qcow:FILE"),
        (["check", "disk.raw"], "does not say its format; write aio:disk.raw"),
        (["snapshot", "aio:disk.raw", "new"], "a raw image cannot have a parent"),
        (["commit", "aio:disk.raw"], "no parent"),
        (["resize", "aio:disk.raw", "1M"], "cannot shrink"),
        (["convert", "disk.raw", "vhd:new"], "does not say its format"),
        (["convert", "aio:disk.raw", "new"], "does not say its format"),
        (["convert", "aio:disk.raw", "vhd:disk.raw"], "exists already"),
        (["convert", "aio:disk.raw", "aio:disk.raw"], "to overwrite all of its content"),
        (["convert", "aoi:disk.raw", "aio:new"], "did you mean aio?"),
        (["map", "disk.raw"], "does not say its format"),
    ],
)
def test_mistakes_are_two_and_a_sentence(run: Run, raw: Path, tmp_path: Path, words: list[str], sentence: str) -> None:
    """Each mistake is refused with status 2 and a sentence before anything is changed."""
    before = raw.read_bytes()
    status, out, err = run(*words)

    assert (status, out) == (2, "")
    assert sentence in err
    assert {"disk.raw": before} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_info_finds_out_what_a_file_is(run: Run, run_json: RunJson, raw: Path) -> None:
    """For a bare file `info` says which format it looks like; for a layer it describes the image."""
    run("convert", "aio:disk.raw", "qcow2:a.qcow2")

    status, out, _ = run("info", "a.qcow2")
    assert (status, out.splitlines()[0]) == (0, "a.qcow2 looks like qcow2; as a layer it is qcow2:a.qcow2")
    for line in ("  format:       QCOW2, version 3", "  disk:         4 MiB (4194304 bytes)"):
        assert line in out.splitlines()
    found = run_json("info", "qcow2:a.qcow2")
    assert (None, 65536) == (found["probed"], found["layers"][0]["cluster_size"])
    assert run_json("info", "disk.raw")["probed"] == "raw"


def test_map_is_qemus_json(run: Run, run_json: RunJson, raw: Path, tmp_path: Path) -> None:
    """The JSON of `map` is that of `qemu-img map --output=json`; people get a table."""
    run("convert", "aio:disk.raw", "qcow2:a.qcow2")
    qemu = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", tmp_path / "a.qcow2"))
    for each in qemu:
        each.pop("compressed", None)  # from QEMU 8.2 on

    assert qemu == run_json("map", "qcow2:a.qcow2")
    _, out, _ = run("map", "qcow2:a.qcow2")
    assert [1 + len(qemu), "layer"] == [len(out.splitlines()), out.splitlines()[0].split()[-1]]


def test_check_ends_as_qemu_img_does(run: Run, raw: Path, tmp_path: Path) -> None:
    """The status is 0 for a sound image, 3 for leaks, 0 again after a repair, and 2 for errors."""
    run("convert", "aio:disk.raw", "vhd:a.vhd")
    assert run("check", "vhd:a.vhd")[:2] == (0, "vhd:a.vhd: 0 errors, 0 leaks\n")
    run("convert", "aio:disk.raw", "qcow2:a.qcow2")
    path = tmp_path / "a.qcow2"
    leak(path)
    status, out, _ = run("check", "qcow2:a.qcow2")
    assert (3, "qcow2:a.qcow2: 0 errors, 1 leaks") == (status, out.splitlines()[-1])
    assert (0, 1) == qemu.check(path)
    status, out, _ = run("check", "qcow2:a.qcow2", "--repair")
    assert (0, ["repaired: 1", "qcow2:a.qcow2: 0 errors, 0 leaks"]) == (status, out.splitlines())
    assert (0, 0) == qemu.check(path)
    with (tmp_path / "a.vhd").open("r+b") as file:
        file.write(bytes(512))
    status, out, _ = run("check", "--json", "vhd:a.vhd")
    assert (2, 2, 1) == (status, json.loads(out)["status"], json.loads(out)["errors"])


def test_a_device_is_written_over_where_that_is_said(run: Run, run_json: RunJson, raw: Path, tmp_path: Path) -> None:
    """Only --overwrite lets `convert` write to an existing target; it cannot be combined with --resume."""
    (tmp_path / "device").write_bytes(b"old!" * MIB)
    assert run("convert", "aio:disk.raw", "aio:device")[0] == 2
    run_json("convert", "aio:disk.raw", "aio:device", "--overwrite")
    assert raw.read_bytes() == (tmp_path / "device").read_bytes()
    with pytest.raises(SystemExit):
        run("convert", "aio:disk.raw", "aio:device", "--overwrite", "--resume")


def test_a_failure_is_one_and_can_be_gone_on_from(run: Run, raw: Path, tmp_path: Path) -> None:
    """If the medium fails, the status is 1, and the message says what failed and how to continue."""
    status, _, err = run("convert", "fault:errno=EIO,op=read|aio:disk.raw", "vhd:new")

    assert status == 1
    assert err.splitlines()[0] == "stopped; the same command with --resume continues new.partial"
    assert "read of 1048576 bytes at 0: Input/output error" in err
    assert (tmp_path / "new.partial").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_that_a_worker_serves_is_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    """While a worker serves an image, commands that change it or rely on its contents are refused, but not `info`."""
    run("convert", "aio:disk.raw", "qcow2:a.qcow2")
    worker = WorkerProcess(f"xenbackend.rig.host:{tmp_path}")
    try:
        assert Stage.OPEN == worker.open(f"qcow2:{tmp_path}/a.qcow2").stage
        user = f"the disk 5/xvda (process {worker.process.pid})"
        for words in (
            ["check", "qcow2:a.qcow2"],
            ["check", "qcow2:a.qcow2", "--repair"],
            ["resize", "qcow2:a.qcow2", "1G"],
            ["snapshot", "qcow2:a.qcow2", "new"],
            ["convert", "qcow2:a.qcow2", "vhd:new"],
            ["map", "qcow2:a.qcow2"],
        ):
            status, _, err = run(*words)
            assert (2, True) == (status, f"is locked by {user}; one writer at a time" in err), words
        assert f"in use by {user}: this may be out of date" in run("info", "qcow2:a.qcow2")[1]
        assert user == json.loads(run("info", "--json", "qcow2:a.qcow2")[1])["used_by"]
        assert not (tmp_path / "new").exists()
    finally:
        worker.drop()


@pytest.mark.usefixtures("no_wait_for_locks")
def test_an_image_that_qemu_uses_is_refused(run: Run, raw: Path, tmp_path: Path) -> None:
    """If QEMU writes to an image, all commands are refused; if it only reads, readers work. `info` names a writer."""
    run("convert", f"aio:{raw}", "qcow2:a.qcow2")
    run("snapshot", "qcow2:a.qcow2", "child.qcow2")
    reads = [
        ["check", "qcow2:a.qcow2"],
        ["map", "qcow2:a.qcow2"],
        ["compare", "qcow2:a.qcow2", "aio:disk.raw"],
        ["measure", "vhd", "qcow2:a.qcow2"],
    ]
    writes = [
        ["check", "qcow2:a.qcow2", "--repair"],
        ["resize", "qcow2:a.qcow2", "1G"],
        ["commit", "qcow2:child.qcow2"],
    ]
    with qemu.held_open("qcow2", tmp_path / "a.qcow2") as pid:
        for words in reads + writes:
            status, _, err = run(*words)
            assert (2, True) == (status, f"(process {pid}); one writer at a time" in err), (words, err)
        said = run("info", "qcow2:a.qcow2")[1]
        assert f"in use by qemu-io -f qcow2 {tmp_path}/a.qcow2"[:60] in said
        assert f"(process {pid}): this may be out of date" in said
    with qemu.held_open("qcow2", tmp_path / "a.qcow2", "-r") as pid:
        for words in writes:
            assert f"(process {pid})" in run(*words)[2], words
        for words in reads:
            assert 0 == run(*words)[0], words
        assert "in use" not in run("info", "qcow2:a.qcow2")[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_was_stopped_goes_on(run: Run, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C ends a conversion with 130 and a hint; however it ended, --resume completes it."""
    words = ["convert", "delay:read=40ms|ram:128M", "qcow2:new"]
    process = subprocess.Popen(
        [sys.executable, "-m", "xenbackend", "image", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    until((tmp_path / "new.partial.json").exists)  # which is written after `new.partial`
    process.send_signal(number)
    _, err = process.communicate(timeout=20)

    if number != signal.SIGKILL:
        assert (130, "stopped; the same command with --resume continues new.partial\n") == (process.returncode, err)
    assert {"new.partial", "new.partial.json"} == {path.name for path in tmp_path.iterdir()}
    assert run(*words, "--resume")[0] == 0
    assert {"new"} == {path.name for path in tmp_path.iterdir()}
    assert (0, 0) == qemu.check(tmp_path / "new")


@pytest.mark.slow
def test_a_terminal_gets_a_bar(raw: Path, tmp_path: Path) -> None:
    """On a terminal a progress bar ends at the disk's size; elsewhere there is none."""
    command = [sys.executable, "-m", "xenbackend", "image", "convert", "aio:disk.raw"]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([*command, "vhd:one"], cwd=tmp_path, stderr=theirs, check=True, env=environment)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    quiet = subprocess.run([*command, "vhd:two"], cwd=tmp_path, capture_output=True, check=True, text=True)

    assert (0, True, True) == (done.returncode, "convert" in shown, "4.2/4.2 MiB" in shown or "4.0/4.0 MiB" in shown)
    assert (quiet.stdout, quiet.stderr) == ("vhd:two: 4 MiB, 1 MiB written\n", "")


def test_compare_says_where(run: Run, raw: Path, tmp_path: Path) -> None:
    """Status 0 and 1 mean equal and different, as with cmp; 2 means that an image is missing or cannot be read."""
    assert 0 == run("convert", "aio:disk.raw", "vhd:b.vhd")[0]
    assert (0, "they read the same\n", "") == run("compare", "aio:disk.raw", "vhd:b.vhd")
    with raw.open("r+b") as file:
        file.seek(3 * MIB + 7)
        file.write(b"x")
    assert (1, f"the first difference is at byte {3 * MIB + 7}\n", "") == run("compare", "aio:disk.raw", "vhd:b.vhd")
    assert (1, "", "") == run("compare", "aio:disk.raw", "vhd:b.vhd", "--quiet")
    status, out, _ = run("compare", "aio:disk.raw", "vhd:b.vhd", "--json")
    assert (1, 3 * MIB + 7) == (status, json.loads(out)["differs_at"])
    os.truncate(raw, 5 * MIB)
    for chains, problem in (
        (("aio:none", "vhd:b.vhd"), "there is no file or device none"),
        (("fault:op=read|aio:disk.raw", "vhd:b.vhd"), "Input/output error"),
        (("disk.raw", "vhd:b.vhd"), "does not say its format"),
    ):
        status, out, err = run("compare", *chains)
        assert (2, "") == (status, out)
        assert problem in err


def test_measure_needs_no_image(run: Run, run_json: RunJson, raw: Path) -> None:
    """`measure` takes the size of a disk or a chain; it prints bytes for scripts, and readable sizes for people."""
    empty = run_json("measure", "qcow2", "--size", "4M")
    assert empty["required"] < MIB < empty["fully_allocated"]
    assert 0 == run("convert", "aio:disk.raw", "qcow2:b.qcow2")[0]
    assert MIB < run_json("measure", "qcow2", "qcow2:b.qcow2")["required"] < 2 * MIB
    assert "4 MiB needed (4194304 bytes)" in run("measure", "raw", "--size", "4M")[1]


def test_trust_says_what_it_marks(run: Run, run_json: RunJson, tmp_path: Path) -> None:
    """`trust` marks an image and all its parents and lists the marks; before that, the image is refused."""
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base", "1M")
    for name, parent, kind in (("mid", "base", "raw"), ("top", "mid", "qcow2")):
        qemu_img("create", "-q", "-f", "qcow2", "-b", parent, "-F", kind, tmp_path / name)
    status, _, sentence = run("map", "qcow2:top")
    assert (2, True) == (status, "allow it with xenbackend image trust LAYER" in sentence)
    status, said, _ = run("trust", "qcow2:top")
    assert (0, [f"top: its parent is {tmp_path}/mid", f"{tmp_path}/mid: its parent is {tmp_path}/base"]) == (
        status,
        said.splitlines(),
    )

    assert f"  parent:       aio:{tmp_path}/base (allowed by its mark)" in run("info", "qcow2:mid")[1].splitlines()
    assert [{"image": "mid", "what": "parent", "file": f"{tmp_path}/base", "before": "its mark"}] == run_json(
        "trust", "qcow2:mid"
    )["marked"]
    assert (0, "aio:base names no other file, so there is nothing to mark\n", "") == run("trust", "aio:base")
    status, _, sentence = run("trust", "base")
    assert (2, True) == (status, "does not say its format" in sentence)
    status, _, sentence = run("trust", "log:|qcow2:top")
    assert (2, True) == (status, "is not an image by itself" in sentence)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed (Debian: util-linux)")
def test_a_file_system_without_marks(tmp_path: Path) -> None:
    """On ramfs, which has no such attributes, the printed layer is enough to open the image, and a refusal says so."""
    program = f"{sys.executable} -m xenbackend image"
    script = f"""
        mount -t ramfs ramfs {tmp_path} || exit 77
        cd {tmp_path}; truncate -s 1M base
        {program} create --json qcow2 child --parent base --parent-format raw
        {program} map --json qcow2:child,parents={tmp_path} >/dev/null || exit 1
        {program} map qcow2:child
        {program} trust qcow2:child
    """
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount for us: {done.stderr.strip()}")
    refused, untrusted = done.stderr.splitlines()

    assert f"qcow2:child,parents={tmp_path}" == json.loads(done.stdout)["text"]
    assert (
        f"cannot keep marks (trusted.* attributes); if it is the right one, its layer must say parents={tmp_path}"
        in refused
    )
    assert "child: its file system cannot keep marks (trusted.* attributes), so its layer must say" in untrusted
