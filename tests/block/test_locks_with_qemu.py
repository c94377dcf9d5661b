"""QEMU's tools and our chains refuse each other's images. The cases are those of QEMU's iotests 153 and 182, both ways.

Must not take a lock by itself: only tools and chains refuse.
"""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path

import pytest

from tests import qemu
from tests.helpers_block import Machine
from xenbackend.block.formats.table import FORMATS
from xenbackend.errors import DriverError

WRITTEN = ("raw", "qcow2", "qcow", "vhd")
ONLY_READ = ("vmdk", "vhdx", "vdi")
WITH_METADATA = tuple(each for each in FORMATS if each != "raw")  # only these forbid readers of QEMU's own


def make(path: Path, name: str, *options: str | Path) -> str:
    """Make an image by QEMU; return the layer that serves it."""
    qemu.qemu_img("create", "-q", "-f", FORMATS[name].qemu_name, *options, path, *([] if "-b" in options else ["4M"]))
    return f"{FORMATS[name].driver}:{path}"


def is_locked(machine: Machine, layer: str, *, read_only: bool = False, shareable: bool = False) -> bool:
    """Return whether a chain is refused because somebody uses its image."""
    try:
        machine.open(layer, read_only=read_only, shareable=shareable).close()
    except DriverError as error:
        if error.errno != errno.EBUSY:
            raise
        return True
    return False


def refused(*command: str | Path) -> bool:
    """Return whether a tool is refused because of a lock. Any other failure fails the test."""
    said = qemu.refusal(*map(str, command))
    assert not said or ("Failed to get" in said and "lock" in said), said
    return bool(said)


def writers(name: str, path: Path) -> dict[str, list[str | Path]]:
    """Return commands that write to an image, or would: each has to be refused before it changes anything."""
    word = FORMATS[name].qemu_name
    commands: dict[str, list[str | Path]] = {
        "qemu-io": ["qemu-io", "-f", word, "-c", "write 0 512", path],
        "bench": ["qemu-img", "bench", "-q", "-f", word, "-w", "-c", "1", path],
        "nbd": ["qemu-nbd", "-f", word, "-k", f"{path}.nbd", path],
        "create": ["qemu-img", "create", "-q", "-f", word, path, "4M"],
        "convert": ["qemu-img", "convert", "-n", "-f", "raw", "-O", word, path.with_name("source"), path],
        "daemon": [
            "qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={path}.qsd",
            "--blockdev", f"driver=file,filename={path},node-name=file",
            "--blockdev", f"driver={word},file=file,node-name=image",
            "--export", "type=nbd,id=export,node-name=image,writable=on",
        ],
    }  # fmt: skip
    if name in ("raw", "qcow2"):
        commands["resize"] = ["qemu-img", "resize", "-q", "-f", word, path, "8M"]
    if name == "qcow2":
        commands |= {
            "amend": ["qemu-img", "amend", "-q", "-f", word, "-o", "lazy_refcounts=on", path],
            "rebase": ["qemu-img", "rebase", "-q", "-u", "-f", word, "-b", "", path],
            "snapshot": ["qemu-img", "snapshot", "-q", "-c", "name", path],
            "repair": ["qemu-img", "check", "-q", "-f", word, "-r", "all", path],
        }
    return commands


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("read_only", [False, True], ids=["written", "read"])
def test_no_tool_of_qemus_writes_to_what_we_have_open(
    machine: Machine, tmp_path: Path, name: str, read_only: bool
) -> None:
    """Each of QEMU's ways to write to an image is refused while we have it open, changes nothing, and works later."""
    path = tmp_path / "image"
    layer = make(path, name)
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    with closing(machine.open(layer, read_only=read_only)):
        before = path.read_bytes()
        for what, command in writers(name, path).items():
            assert refused(*command), what
        assert before == path.read_bytes()

    assert not refused("qemu-io", "-f", FORMATS[name].qemu_name, "-c", "write 0 512", path)


@pytest.mark.parametrize("name", ONLY_READ)
def test_nor_to_what_we_only_read(machine: Machine, tmp_path: Path, name: str) -> None:
    """QEMU does not write to images of read-only formats that we have open, either."""
    path = tmp_path / "image"
    with closing(machine.open(make(path, name), read_only=True)):
        assert refused("qemu-io", "-f", FORMATS[name].qemu_name, "-c", "write 0 512", path)
        assert not refused("qemu-io", "-r", "-f", FORMATS[name].qemu_name, "-c", "read 0 512", path)


@pytest.mark.parametrize("name", WRITTEN)
def test_readers_go_beside_readers(machine: Machine, tmp_path: Path, name: str) -> None:
    """QEMU and we read an image at the same time, whoever comes first."""
    path, word = tmp_path / "image", FORMATS[name].qemu_name
    layer = make(path, name)
    with closing(machine.open(layer, read_only=True)):
        assert not refused("qemu-io", "-r", "-f", word, "-c", "read 0 512", path)
        assert not refused("qemu-img", "convert", "-f", word, "-O", "raw", path, tmp_path / "copy")
    with qemu.held_open(word, path, "-r"):
        assert not is_locked(machine, layer, read_only=True)


@pytest.mark.parametrize("name", [each for each in WRITTEN if each in WITH_METADATA])
def test_what_we_write_qemu_does_not_take_for_stable(machine: Machine, tmp_path: Path, name: str) -> None:
    """While we write to an image, QEMU's readers are refused, unless they are told that it may change (-U)."""
    path, word = tmp_path / "image", FORMATS[name].qemu_name
    layer = make(path, name)
    with closing(machine.open(layer)):
        for command in (["info"], ["map"], ["compare", path]):
            assert refused("qemu-img", *command[:1], "-f", word, *command[1:], path), command
            assert not refused("qemu-img", *command[:1], "-U", "-f", word, *command[1:], path), command
        assert not refused("qemu-io", "-r", "-U", "-f", word, "-c", "read 0 512", path)


def test_a_child_may_be_made_of_what_we_write(machine: Machine, tmp_path: Path) -> None:
    """`qemu-img create -b` only names the parent, so it is not refused while we write to that image."""
    layer = make(tmp_path / "image", "qcow2")
    with closing(machine.open(layer)):
        assert not refused("qemu-img", "create", "-q", "-f", "qcow2", "-b", tmp_path / "image", "-F", "qcow2",
                           tmp_path / "child")  # fmt: skip


@pytest.mark.parametrize("name", [*WRITTEN, *ONLY_READ])
@pytest.mark.parametrize("holder", ["qemu-io", "qemu-nbd", "qemu-storage-daemon"])
def test_we_refuse_what_qemu_writes_to(machine: Machine, tmp_path: Path, name: str, holder: str) -> None:
    """While one of QEMU's tools has an image open for writing, we neither write nor read. Later we can do both."""
    path, word = tmp_path / "image", FORMATS[name].qemu_name
    layer = make(path, name)
    command = writers(name, path)["daemon" if holder == "qemu-storage-daemon" else "nbd"][1:]
    held = qemu.held_open(word, path) if holder == "qemu-io" else qemu.daemon(holder, tmp_path / "pid", *command)
    with held:
        assert is_locked(machine, layer, read_only=True)
        assert name in ONLY_READ or is_locked(machine, layer)
        assert name in ONLY_READ or is_locked(machine, layer, shareable=True) == (name in WITH_METADATA)

    assert not is_locked(machine, layer, read_only=name in ONLY_READ)


@pytest.mark.parametrize("name", WRITTEN)
def test_we_do_not_write_to_what_qemu_reads(machine: Machine, tmp_path: Path, name: str) -> None:
    """A QEMU reader that forbids writers keeps us from writing. For raw images only its NBD server does."""
    path, word = tmp_path / "image", FORMATS[name].qemu_name
    layer = make(path, name)
    with qemu.daemon("qemu-nbd", tmp_path / "pid", "-r", "-f", word, "-k", tmp_path / "socket", path):
        assert is_locked(machine, layer)
        assert not is_locked(machine, layer, read_only=True)
    with qemu.held_open(word, path, "-r"):
        assert is_locked(machine, layer) == (name in WITH_METADATA)


@pytest.mark.parametrize("name", WRITTEN)
def test_who_looks_with_force_does_not_keep_us_out(machine: Machine, tmp_path: Path, name: str) -> None:
    """`qemu-img convert -U` of a disk in service, which may take hours, does not keep out a successor."""
    path = tmp_path / "image"
    layer = make(path, name)
    with qemu.held_open(FORMATS[name].qemu_name, path, "-r", "-U"):
        assert not is_locked(machine, layer)


@pytest.mark.parametrize("name", ["qcow2", "vhd"])
def test_parents_are_locked_for_readers(machine: Machine, tmp_path: Path, name: str) -> None:
    """An image that is open as a parent is not written to. Others read it, even as the parent of a child of QEMU's."""
    parent, child, other = (tmp_path / each for each in ("parent", "child", "other"))
    word = FORMATS[name].qemu_name
    make(parent, name)
    layer = make(child, "qcow2", "-b", parent, "-F", word)
    make(other, "qcow2", "-b", parent, "-F", word)
    with closing(machine.open(layer)):
        assert refused("qemu-io", "-f", word, "-c", "write 0 512", parent)
        assert refused("qemu-img", "commit", "-q", "-f", "qcow2", other)
        assert not refused("qemu-io", "-f", "qcow2", "-c", "write 0 512", other)
    with qemu.held_open(word, parent):
        assert is_locked(machine, layer)
        assert is_locked(machine, layer, read_only=True)
    with qemu.held_open("qcow2", other):
        assert not is_locked(machine, layer)
        assert is_locked(machine, f"{FORMATS[name].driver}:{parent}")


def test_data_files_and_extents_are_locked_too(machine: Machine, tmp_path: Path) -> None:
    """Every file of an image, such as a data file or an extent, is locked."""
    path, data = tmp_path / "image", tmp_path / "data"
    layer = f"{make(path, 'qcow2', '-o', f'data_file={data},data_file_raw=on')},data_file={data}"
    with closing(machine.open(layer)):
        assert refused("qemu-io", "-f", "raw", "-c", "write 0 512", data)
    with qemu.held_open("raw", data):
        assert is_locked(machine, layer)
    make(tmp_path / "flat.vmdk", "vmdk", "-o", "subformat=monolithicFlat")
    with closing(machine.open(f"vmdk:{tmp_path}/flat.vmdk", read_only=True)):
        assert refused("qemu-io", "-f", "raw", "-c", "write 0 512", tmp_path / "flat-flat.vmdk")


def test_a_link_is_the_same_image(machine: Machine, tmp_path: Path) -> None:
    """An image is locked under all of its names: symbolic and hard links too."""
    path = tmp_path / "image"
    layer = make(path, "qcow2")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    with closing(machine.open(layer)):
        for other in ("link", "hard"):
            assert refused("qemu-io", "-f", "qcow2", "-c", "write 0 512", tmp_path / other)
    for other in ("link", "hard"):
        with qemu.held_open("qcow2", tmp_path / other):
            assert is_locked(machine, layer)


def test_who_shares_goes_beside_who_shares(machine: Machine, tmp_path: Path) -> None:
    """A disk attached as w! can be used beside a QEMU writer that forbids nothing, but not beside one that does."""
    path = tmp_path / "image"
    layer = make(path, "raw")
    with closing(machine.open(layer, shareable=True)):
        assert not refused("qemu-io", "-f", "raw", "-c", "write 0 512", path)
        assert not is_locked(machine, layer, shareable=True)
        assert is_locked(machine, layer)
        assert is_locked(machine, layer, read_only=True)
    with qemu.held_open("raw", path):
        assert not is_locked(machine, layer, shareable=True)
