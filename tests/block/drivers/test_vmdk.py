"""vmdk: parents, and compressed grains; reading what QEMU wrote is in test_vdi.py."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.block.drivers.test_qcow2 import contents
from tests.foreign_images import GRAIN, MIB, vmdk
from tests.helpers_block import Machine, content, read
from xenbackend.errors import DriverError

SIZE = 4 * MIB
CHILD = {1: b"c" * GRAIN}


def make(directory: Path, *, parent: str = "base.vmdk", parent_cid: int = 0x1234) -> str:
    """Write an image and its parent, and return the text of the image's layer."""
    (directory / "base.vmdk").write_bytes(vmdk(SIZE, {0: b"p" * GRAIN, 1: b"p" * GRAIN}))
    (directory / "a.vmdk").write_bytes(vmdk(SIZE, {**CHILD, 2: None}, parent=parent, parent_cid=parent_cid))
    return f"vmdk:{directory}/a.vmdk"


@pytest.mark.parametrize("parent", ["base.vmdk", "C:\\\\machines\\\\base.vmdk", "/gone/base.vmdk"])
def test_a_snapshot(machine: Machine, tmp_path: Path, parent: str) -> None:
    """What a snapshot does not have is its parent's, which is found beside it whatever its directory was."""
    found = contents(machine, make(tmp_path, parent=parent))

    assert b"pc\0\0" == found[: 4 * GRAIN : GRAIN]


def test_a_parent_that_was_altered(machine: Machine, tmp_path: Path) -> None:
    """A parent with another content ID is refused, unless the operator accepts it."""
    text = make(tmp_path, parent_cid=0x4321)
    with pytest.raises(DriverError, match="content ID 00001234, and this image was made for 00004321"):
        machine.open(text, read_only=True)

    assert b"pc" == contents(machine, text + ",changed=accept")[: 2 * GRAIN : GRAIN]


def test_a_parent_that_is_another_kind_of_image(machine: Machine, tmp_path: Path) -> None:
    """Whatever the parent's name is, it is read as VMDK, and refused where it is none."""
    text = make(tmp_path)
    (tmp_path / "base.vmdk").write_bytes(bytes(SIZE))
    with pytest.raises(DriverError, match="it is no VMDK image"):
        machine.open(text, read_only=True)


def test_damaged_grains(machine: Machine, tmp_path: Path) -> None:
    """A compressed grain that does not inflate is EIO for whoever reads it, and for nobody else."""
    data = vmdk(SIZE, {0: b"a" * GRAIN, 1: b"b" * GRAIN}, compressed=True)
    (tmp_path / "a").write_bytes(data[:GRAIN] + bytes(512) + data[GRAIN + 512 :])
    chain = machine.open(f"vmdk:{tmp_path}/a", read_only=True)
    request = read(GRAIN, 512)
    assert [errno.EIO, 0, 0] == machine.do(chain, read(0, 512), request, read(2 * GRAIN, 512))
    chain.close()

    assert b"b" * 512 == content(request)
