"""vmdk: disks in several files, OVAs, parents, and compressed grains. test_vdi.py reads what QEMU wrote."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from random import Random

import pytest

from tests.foreign_images import GRAIN, MIB, archive, cowd, descriptor, ovf, vmdk
from tests.helpers_block import Machine, content, read
from tests.qemu import qemu_img
from xenbackend.block.formats import vmdk as vmdk_format
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
    """What a snapshot does not have comes from its parent, which is found beside it, whatever its former directory."""
    found = machine.contents(make(tmp_path, parent=parent))

    assert b"pc\0\0" == found[: 4 * GRAIN : GRAIN]


def test_a_parent_that_was_altered(machine: Machine, tmp_path: Path) -> None:
    """A parent with another content ID is refused, unless the operator accepts it."""
    text = make(tmp_path, parent_cid=0x4321)
    with pytest.raises(DriverError, match="content ID 00001234, and this image was made for 00004321"):
        machine.open(text, read_only=True)

    assert b"pc" == machine.contents(text + ",changed=accept")[: 2 * GRAIN : GRAIN]


def test_a_parent_that_is_another_kind_of_image(machine: Machine, tmp_path: Path) -> None:
    """A parent is read as VMDK whatever its name, and refused if it is not."""
    text = make(tmp_path)
    (tmp_path / "base.vmdk").write_bytes(bytes(SIZE))
    with pytest.raises(DriverError, match="it is not a VMDK image"):
        machine.open(text, read_only=True)


def test_damaged_grains(machine: Machine, tmp_path: Path) -> None:
    """A compressed grain that cannot be inflated gives EIO to those who read it, and to nobody else."""
    data = vmdk(SIZE, {0: b"a" * GRAIN, 1: b"b" * GRAIN}, compressed=True)
    (tmp_path / "a").write_bytes(data[:GRAIN] + bytes(512) + data[GRAIN + 512 :])
    chain = machine.open(f"vmdk:{tmp_path}/a", read_only=True)
    request = read(GRAIN, 512)
    assert [errno.EIO, 0, 0] == machine.do(chain, read(0, 512), request, read(2 * GRAIN, 512))
    chain.close()

    assert b"b" * 512 == content(request)


def in_pieces(directory: Path, chance: Random, *, zeros: bool) -> bytes:
    """Write a disk of flat and sparse extents of random lengths, and return its content."""
    lines, model = [], b""
    for number, grains in enumerate([3, 17, 33, 1, 40]):
        name, size = f"p-{number}.vmdk", grains * GRAIN
        if zeros and number == 3:
            lines.append(f"RW {size // 512} ZERO")
            model += bytes(size)
        elif number % 2:
            data = chance.randbytes(size)
            (directory / name).write_bytes(b"!" * 1024 + data + b"behind it")
            lines.append(f'RW {size // 512} FLAT "{name}" 2')
            model += data
        else:
            filled = {each: chance.randbytes(GRAIN) for each in range(grains) if chance.random() < 0.3}
            (directory / name).write_bytes(vmdk(size, filled))
            lines.append(f'RW {size // 512} SPARSE "{name}"')
            model += b"".join(filled.get(each, bytes(GRAIN)) for each in range(grains))
    (directory / "a.vmdk").write_bytes(descriptor(*lines, create_type="twoGbMaxExtentSparse"))
    return model


@pytest.mark.parametrize("zeros", [False, True])
def test_a_disk_in_several_files(machine: Machine, tmp_path: Path, zeros: bool) -> None:
    """Extents of all kinds follow one another, whatever their borders, and QEMU reads the same."""
    chance = Random(1)
    model = in_pieces(tmp_path, chance, zeros=zeros)
    chain = machine.open(f"vmdk:{tmp_path}/a.vmdk", read_only=True)
    requests = [read(chance.randrange(len(model) - (1 << 20) >> 9) << 9, 512, 4096, 300_032) for _ in range(40)]
    requests.append(read(0, len(model)))
    assert [0] * len(requests) == machine.do(chain, *requests)
    chain.close()

    for request in requests:
        assert model[request.offset :][: request.length] == content(request)
    if not zeros:  # QEMU does not read those
        (tmp_path / "raw").write_bytes(model)
        qemu_img("compare", "-f", "vmdk", "-F", "raw", tmp_path / "a.vmdk", tmp_path / "raw")


def test_a_disk_of_esx(machine: Machine, tmp_path: Path) -> None:
    """A snapshot of ESX, with grains of one sector over a flat parent, reads as in QEMU."""
    base = bytearray(Random(2).randbytes(3 * MIB))
    (tmp_path / "base-flat.vmdk").write_bytes(base)
    (tmp_path / "base.vmdk").write_bytes(descriptor(f'RW {3 * MIB // 512} VMFS "base-flat.vmdk"', create_type="vmfs"))
    grains = {number: bytes([number % 251]) * 512 for number in (0, 9, 8, 4095, 4096, 6143)}
    (tmp_path / "d.vmdk").write_bytes(cowd(3 * MIB, grains))
    line = f'RW {3 * MIB // 512} VMFSSPARSE "d.vmdk"'
    text = descriptor(line, create_type="vmfsSparse", parent_cid=0x1234, parent="base.vmdk")
    (tmp_path / "a.vmdk").write_bytes(text)
    for number, data in grains.items():
        base[number * 512 : number * 512 + 512] = data

    assert base == machine.contents(f"vmdk:{tmp_path}/a.vmdk")
    (tmp_path / "raw").write_bytes(base)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", tmp_path / "a.vmdk", tmp_path / "raw")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_disk_in_an_ova(machine: Machine, tmp_path: Path, compressed: bool) -> None:
    """A disk in an archive is read where it lies there, and nothing behind it is."""
    one = vmdk(SIZE, {3: b"1" * GRAIN}, compressed=compressed, at_end=compressed)
    two = vmdk(SIZE, {63: b"2" * GRAIN})[:-1024]  # the last grain ends beyond the end of the file
    files = [("a.ovf", ovf("1.vmdk", "2.vmdk")), ("1.vmdk", one), ("2.vmdk", two), ("secret", b"s" * 4096)]
    (tmp_path / "a.ova").write_bytes(archive(files))
    text = f"vmdk:{tmp_path}/a.ova"

    assert bytes(3 * GRAIN) + b"1" * GRAIN + bytes(60 * GRAIN) == machine.contents(f"{text},disk=1.vmdk")
    expected = bytes(63 * GRAIN) + b"2" * (GRAIN - 1024) + bytes(1024)
    assert expected == machine.contents(f"{text},disk=2.vmdk")
    with pytest.raises(DriverError, match=r"choose one with disk=NAME: 1\.vmdk, 2\.vmdk"):
        machine.open(text, read_only=True)


def test_a_choice_where_there_is_none(machine: Machine, tmp_path: Path) -> None:
    """`disk=` is refused if there is nothing to choose from."""
    in_pieces(tmp_path, Random(1), zeros=False)
    for name in ("a.vmdk", "p-0.vmdk"):
        with pytest.raises(DriverError, match="it is not an OVA"):
            machine.open(f"vmdk:{tmp_path}/{name},disk=x", read_only=True)


def one_extent(directory: Path, line: str) -> str:
    """Write a descriptor with one extent, and return the text of its layer."""
    (directory / "a.vmdk").write_bytes(descriptor(line))
    return f"vmdk:{directory}/a.vmdk"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('RW 8 FLAT "gone" 0', "its extent is not there: the image names 'gone'; put the extent there"),
        ('RW 8 FLAT "../secret" 0', "secret is named only by the image; if it is the right one, allow it with"),
        ('RW 8 FLAT "{outside}/secret" 0', "secret is named only by the image"),
        ('RW 8 FLAT "link" 0', "link is /.*/secret, and is named only by the image"),
        ('RW 8 FLAT "/dev/zero" 0', "/dev/zero is not a file"),
        ('RW 8 FLAT "pipe" 0', "pipe is not a file"),
        ('RW 8 FLAT "socket" 0', "socket is not a file"),
        ('RW 8 FLAT "." 0', "is a directory"),
        ('RW 8 FLAT "small" 0', "small: it is damaged: it has 512 bytes, and 4096 from byte 0 on are wanted"),
        ('RW 1 FLAT "small" 9007199254740991', "from byte 4611686018427387392 on are wanted"),
        ('RW 8 SPARSE "small"', "small: it is not a VMDK image"),
        ('RW 8 VMFSSPARSE "small"', "small: it is not an extent of the format COWD"),
        ('RW 8 SESPARSE "small"', "its extent 'small' is of ESXi's format SE sparse"),
        ("RW 999999999999999 ZERO", "of a disk of 511999999999999488 bytes"),
        ("", "names 0 extents and not 1 to 512"),
        ('RW 1 FLAT "small" 0\n' * 513, "names 513 extents and not 1 to 512"),
    ],
)
def test_extents_that_are_refused(tmp_path: Path, line: str, sentence: str) -> None:
    """R18: a file that a descriptor names is opened only in a place that an administrator allows, if it is large
    enough, and if it is a regular file.
    """
    images = tmp_path / "images"
    images.mkdir()
    machine = Machine(parents=[str(images)])
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    (images / "link").symlink_to(tmp_path / "secret")
    (images / "small").write_bytes(bytes(512))
    os.mkfifo(images / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(images / "socket"))
        with pytest.raises(DriverError, match=sentence):
            machine.open(one_extent(images, line.format(outside=tmp_path)), read_only=True)
    machine.close()


def test_an_operator_may_name_the_directory_of_extents(machine: Machine, tmp_path: Path) -> None:
    """`parents=` allows the directory of the extents. A device is refused all the same."""
    (tmp_path / "images").mkdir()
    (tmp_path / "data").write_bytes(b"d" * 4096)
    text = one_extent(tmp_path / "images", 'RW 8 FLAT "../data" 0')
    assert b"d" * 4096 == machine.contents(f"{text},parents={tmp_path}")

    text = one_extent(tmp_path / "images", 'RW 8 FLAT "/dev/null" 0')
    with pytest.raises(DriverError, match="/dev/null is not a file"):
        machine.open(f"{text},parents=/dev", read_only=True)


def test_a_table_that_is_damaged(machine: Machine, tmp_path: Path) -> None:
    """A table that names a place beyond the end of the file gives EIO to those who read there, and to nobody else."""
    data = bytearray(vmdk(64 * MIB, {0: b"a" * GRAIN, 512: b"b" * GRAIN}))
    place = 512 + 10240 + 512  # of the first table
    data[place : place + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "s").write_bytes(data)
    chain = machine.open(one_extent(tmp_path, f'RW {64 * MIB // 512} SPARSE "s"'), read_only=True)
    request = read(512 * GRAIN, 512)
    assert [errno.EIO, 0] == machine.do(chain, read(0, 512), request)
    chain.close()

    assert b"b" * 512 == content(request)


def test_nothing_is_left_open(machine: Machine, tmp_path: Path) -> None:
    """If one of many extents is refused, the files of the others are closed."""
    in_pieces(tmp_path, Random(1), zeros=False)
    (tmp_path / "p-4.vmdk").write_bytes(bytes(512))
    with pytest.raises(DriverError, match=r"p-4\.vmdk: it is not a VMDK image"):
        machine.open(f"vmdk:{tmp_path}/a.vmdk", read_only=True)

    left = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [] == [path for path in left if path.is_relative_to(tmp_path)]


def test_directories_that_would_fill_the_memory(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory for all extents of a disk together is bounded."""
    monkeypatch.setattr(vmdk_format, "MAX_DIRECTORY", 8)
    (tmp_path / "s").write_bytes(vmdk(SIZE, {}))
    line = f'RW {SIZE // 512} SPARSE "s"'
    machine.open(one_extent(tmp_path, f"{line}\n{line}"), read_only=True).close()
    with pytest.raises(DriverError, match="have directories of more than 8 bytes"):
        machine.open(one_extent(tmp_path, f"{line}\n{line}\n{line}"), read_only=True)
