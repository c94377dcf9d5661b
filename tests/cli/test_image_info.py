"""The verb info of the command image, as main runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.foreign_images import GRAIN, MIB, archive, descriptor, ovf, vdi, vmdk
from tests.qcow_images import qcow2
from tests.vhd_images import image
from xenbackend.cli.main import main
from xenbackend.image.names import find_image
from xenbackend.image.trust import trust

Run = Callable[..., tuple[int, str, str]]
# What takes long to import, and what only other commands and other images need. "xenbackend.block.drivers." is all.
DEAR = {
    "asyncio", "daemon", "difflib", "logging", "multiprocessing", "pathlib", "platform", "pyxs", "rich", "structlog",
    "subprocess", "urllib", "uuid", "xml", "xenbackend.bench", "xenbackend.block.leaf", "xenbackend.host",
    "xenbackend.image.convert", "xenbackend.image.create", "xenbackend.image.extents", "xenbackend.image.resize",
    "xenbackend.image.transfer", "xenbackend.kernel.aio", "xenbackend.kernel.uring", "xenbackend.rig",
    "xenbackend.supervisor", "xenbackend.worker.engine", "xenbackend.worker.io_queue",
}  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the verb in the test's directory and returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run_it(*words: str) -> tuple[int, str, str]:
        status = main(["image", "info", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run_it


def test_what_is_served_is_a_layer(run: Run, tmp_path: Path) -> None:
    """An image that can be served ends with status 0 and is shown with its layer, ISO and OVA images included."""
    (tmp_path / "d.ova").write_bytes(archive([("a.ovf", ovf("d")), ("d", vmdk(MIB, {1: b"x" * GRAIN}))]))
    (tmp_path / "cd").write_bytes(bytes(32768) + b"\1CD001\1" + bytes(505))
    (tmp_path / "f-flat.vmdk").write_bytes(bytes(4096))
    (tmp_path / "f.vmdk").write_bytes(descriptor('RW 8 FLAT "f-flat.vmdk" 0', create_type="monolithicFlat"))
    trust(find_image(f"vmdk:{tmp_path}/f.vmdk", ("vmdk",)))

    for name, says, line in [
        ("d.ova", "looks like ova; as a layer it is vmdk:d.ova", "VMDK, grains of 64 KiB"),
        ("cd", "looks like iso; as a layer it is aio:cd (as a disk it can only be read: attach it read-only)", "raw"),
        ("f.vmdk", "looks like vmdk; as a layer it is vmdk:f.vmdk", "VMDK, monolithicFlat, flat"),
    ]:
        status, out, err = run(name)
        assert (0, "", f"{name} {says}") == (status, err, out.splitlines()[0])
        assert f"  format:       {line}" in out.splitlines()


def test_facts_come_first(run: Run, tmp_path: Path) -> None:
    """For an image that cannot be served the known facts are printed, then the reason and a remedy, with status 2."""
    (tmp_path / "a.qed").write_bytes(b"QED\0".ljust(48, b"\0") + (MIB).to_bytes(8, "little") + bytes(512))
    status, out, err = run("a.qed")
    assert (2, "a.qed") == (status, out.splitlines()[0])
    assert "  disk:         1 MiB (1048576 bytes)" in out.splitlines()
    assert "a.qed looks like a QED image, which no driver serves; qemu-img convert -f qed -O qcow2 a.qed a.qcow2" in err

    names = [(b"W2ru", "base.vhd".encode("utf-16-le"))]
    (tmp_path / "c.vhd").write_bytes(image(MIB, parent_uuid=b"p" * 16, names=names))
    status, out, err = run("c.vhd")
    assert (2, "c.vhd looks like vhd; as a layer it is vhd:c.vhd") == (status, out.splitlines()[0])
    assert "  parent:       called 'base.vhd' by the image" in out.splitlines()
    assert "its parent is not there" in err


def test_json_has_the_same(run: Run, tmp_path: Path) -> None:
    """JSON has the known facts and the obstacle; status and sentence are the same as in the text."""
    (tmp_path / "a").write_bytes(qcow2(MIB, backing=b"gone", backing_format=b"raw"))
    status, out, err = run("a", "--json")
    found = json.loads(out)
    assert (2, "qcow2", ["gone"]) == (status, found["probed"], found["layers"][0]["parent_names"])
    assert f"xenbackend: {found['problem']}\n" == err

    (tmp_path / "z").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    status, out, err = run("z", "--json")
    found = json.loads(out)
    assert (2, "gzip", "", 603) == (status, found["probed"], found["chain"], found["layers"][0]["file_size"])
    assert "gunzip -c z > z.unpacked" in found["problem"]


def test_nothing_in_a_name_reaches_the_terminal(run: Run, tmp_path: Path) -> None:
    """Control characters in a parent's name, which may be any bytes, are escaped."""
    (tmp_path / "a").write_bytes(qcow2(MIB, backing=b"\x1b[2J\xff", backing_format=b"raw"))
    _, out, err = run("a")

    assert "\x1b" not in out + err


def test_a_choice_of_disks_is_offered(run: Run, tmp_path: Path) -> None:
    """For an OVA with several disks their names are listed."""
    (tmp_path / "a.ova").write_bytes(archive([("a.ovf", ovf("1", "2")), ("1", b""), ("2", b"")]))
    status, out, err = run("a.ova")

    assert (2, True, True) == (status, "files:        1, 2" in out, "choose one with disk=NAME: 1, 2" in err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "data", "driver"),
    [
        (["info", "image"], qcow2(MIB), "qcow2"),
        (["info", "qcow2:image"], qcow2(MIB), "qcow2"),
        (["info", "image"], vmdk(MIB, {}), "vmdk"),
        (["info", "image"], vdi(MIB, {}), "vdi"),
        (["info", "image"], bytes(MIB), "aio"),
        (["check", "qcow2:image"], qcow2(MIB), ""),
    ],
)
def test_looking_imports_little(tmp_path: Path, words: list[str], data: bytes, driver: str) -> None:
    """`info` imports no expensive module that it does not need, and no other format's driver."""
    (tmp_path / "image").write_bytes(data)
    program = (
        "import sys, xenbackend.cli.main as cli;"
        f"assert cli.main({['image', *words]!r}) == 0; print(*sorted(sys.modules), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
    )  # fmt: skip
    loaded = done.stdout.splitlines()
    drivers = {name for name in loaded if name.startswith("xenbackend.block.drivers.")}

    assert [] == [name for name in loaded if any(name == dear or name.startswith(f"{dear}.") for dear in DEAR)]
    assert drivers <= ({f"xenbackend.block.drivers.{driver}"} if driver else drivers)
