"""The format that a file seems to have, and advice about it."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import struct
import subprocess
from pathlib import Path

import pytest

from tests.foreign_images import MIB, archive, cowd, descriptor, ovf, vdi, vmdk
from tests.qemu import qemu_img
from tests.vhd_images import fixed
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.looks import hint_for, layer_of, look_at, open_to_look, reader
from xenbackend.image.names import find_image

ISO = bytes(32768) + b"\1CD001\1" + bytes(4096)
PARTITIONED = bytes(446) + b"\x80\1\1\0\x83" + bytes(59) + b"\x55\xaa" + bytes(4096)
OLDEST = bytearray(archive([("a.ovf", ovf("b")), ("b", b"")]))
OLDEST[257:265] = bytes(8)
OLDEST[148:155] = b"%06o\0" % (sum(OLDEST[:148]) + 8 * 32 + sum(OLDEST[156:512]))
SERVED = {
    "qcow": (b"QFI\xfb\0\0\0\1" + bytes(600), "qcow"),
    "qcow2": (b"QFI\xfb\0\0\0\2" + bytes(600), "qcow2"),
    "vhd, fixed": (fixed(bytes(4096)), "vhd"),
    "vhd, fixed, of a guest that has an archive": (fixed(b"\x1f\x8b\x08".ljust(4096)), "vhd"),
    "qcow2, of a guest that has a VHD": (b"QFI\xfb\0\0\0\3".ljust(1024) + fixed(b""), "qcow2"),
    "vhd, without its end": (fixed(b"")[-512:] + bytes(4096), "vhd"),
    "vhdx": (b"vhdxfile" + bytes(600), "vhdx"),
    "vmdk": (vmdk(MIB, {}), "vmdk"),
    "vmdk, descriptor": (descriptor('RW 8 FLAT "a" 0', create_type="vmfs"), "vmdk"),
    "vmdk, descriptor of another writer": (b"\n# by hand\nversion=1\n", "vmdk"),
    "vdi": (vdi(MIB, {}), "vdi"),
    "ova": (archive([("a.ovf", ovf("b")), ("b", b"")]), "vmdk"),
    "ova, in the oldest kind of tar": (OLDEST, "vmdk"),
    "iso": (ISO, "aio"),
    "iso, bootable from a stick": (PARTITIONED[:512] + ISO[512:], "aio"),
    "raw": (bytes(4096), "aio"),
    "raw, with partitions": (PARTITIONED, "aio"),
    "raw, with a text": (b"# this is no descriptor\nversion of a text\n" * 99, "aio"),
    "raw, of a byte": (b"x", "aio"),
    "raw, empty": (b"", "aio"),
}
OTHERS = {
    "luks": (b"LUKS\xba\xbe\0\1" + bytes(600), "luks:key=KEYFILE|aio:x serves it, where KEYFILE has its passphrase"),
    "qed": (b"QED\0" + bytes(600), "qemu-img convert -f qed -O qcow2 x x.qcow2 makes"),
    "parallels": (b"WithoutFreeSpace" + bytes(600), "qemu-img convert -f parallels"),
    "parallels, newer": (b"WithouFreSpacExt" + bytes(600), "qemu-img convert -f parallels"),
    "bochs": (b"Bochs Virtual HD Image\0" + bytes(600), "qemu-img convert -f bochs"),
    "cloop": (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop" + bytes(600), "qemu-img convert -f cloop"),
    "dmg": (bytes(1024) + b"koly" + bytes(508), "qemu-img convert -f dmg"),
    "cowd": (cowd(MIB, {}), "vmdk: serves the disk by its descriptor"),
    "sesparse": (struct.pack("<Q", 0xCAFEBABE) + bytes(600), "qemu-img convert -f vmdk"),
    "tar": (archive([("readme", b"")]), "extract it with tar -xf x"),
    "tar, damaged": (archive([("a.ovf", b"")])[:200] + b"!" + archive([("a.ovf", b"")])[201:], "tar -xf x"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "gunzip -c x > x.unpacked"),
    "bzip2": (b"BZh91AY&SY" + bytes(600), "bunzip2 -c x > x.unpacked"),
    "xz": (b"\xfd7zXZ\0" + bytes(600), "unxz -c x > x.unpacked"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "unzstd -c x > x.unpacked"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(600), "unlz4 -c x > x.unpacked"),
    "zip": (b"PK\3\4" + bytes(600), "unzip x"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), "7z x x"),
}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the directory with the images."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", SERVED)
def test_what_a_driver_serves(directory: Path, case: str) -> None:
    """A format is recognized by a file's beginning or end. A file without one, whatever its content, is a raw disk."""
    content, driver = SERVED[case]
    (directory / "x").write_bytes(content)
    look = look_at("x")

    assert (case.partition(",")[0], f"{driver}:x") == (look.name, layer_of(look, "x"))


@pytest.mark.parametrize("case", OTHERS)
def test_what_no_driver_serves(directory: Path, case: str) -> None:
    """A format that no driver serves is named and never called raw, and the advice has the file's name."""
    content, advice = OTHERS[case]
    (directory / "x").write_bytes(content)
    look = look_at("x")

    assert (case.partition(",")[0], "", "") == (look.name, look.driver, layer_of(look, "x"))
    assert advice in look.advice
    with pytest.raises(ConfigError, match=r"it looks like .*, which no driver serves; ") as caught:
        find_image("x")
    assert look.advice in str(caught.value)


@pytest.mark.parametrize("image_format", ["qed", "parallels", "qcow", "qcow2", "vdi", "vhdx", "vmdk"])
def test_what_qemu_makes_is_known(image_format: str) -> None:
    """Formats are recognized under QEMU's names, and the advised command works as printed."""
    qemu_img("create", "-q", "-f", image_format, "an image", "1M")
    look = look_at("an image")

    assert image_format == look.name
    if not look.driver:
        qemu_img("convert", "-f", image_format, "-O", "qcow2", "an image", "an image.qcow2")
        assert "qemu-img convert -f " + image_format + " -O qcow2 'an image' 'an image.qcow2' makes" in look.advice
        assert "qcow2" == look_at("an image.qcow2").name


@pytest.mark.parametrize("name", ["a b.img.gz", "appliance.ova"])
def test_what_is_packed_is_unpacked_by_what_is_advised(directory: Path, name: str) -> None:
    """The advised command to extract an archive works as printed, whatever the file's name, and keeps the archive."""
    (directory / name).write_bytes(gzip.compress(vmdk(MIB, {})))
    found = re.fullmatch(r"if it contains an image, extract it with (.* > (.*))", look_at(name).advice)
    assert found is not None
    subprocess.run(found[1], shell=True, check=True)  # noqa: S602 - as its reader would

    assert "vmdk" == look_at(shlex.split(found[2])[0]).name
    assert (directory / name).exists()


def test_an_iso_is_a_raw_disk_for_reading(directory: Path) -> None:
    """An ISO 9660 image is a raw disk, with the advice to attach it read-only."""
    (directory / "x").write_bytes(ISO)

    assert "write aio:x if that is what it is: it looks like an ISO 9660 image" in hint_for("x")
    assert "attach it read-only" in hint_for("x")


def test_any_name_is_written_safely(directory: Path) -> None:
    """In the advice, a name with spaces, quotes, braces or a newline is one word of a command and one line."""
    name = "a {0} 'b'\n.x"
    (directory / name).write_bytes(b"QED\0" + bytes(600))

    assert r"""'a {0} '"'"'b'"'"'\n.x'""" in look_at(name).advice
    assert "\n" not in look_at(name).advice


def test_what_is_no_file(directory: Path) -> None:
    """Anything but a file or block device is refused, and a pipe is not waited for."""
    os.mkfifo(directory / "pipe")
    for name in ("pipe", ".", "/dev/null"):
        with pytest.raises(DriverError, match="is neither a file nor a block device"):
            look_at(name)
        assert "write the driver before it" in hint_for(name)
    with pytest.raises(DriverError, match="none: No such file"):
        look_at("none")


@pytest.mark.parametrize("place", [-1, 4, 1 << 63, (1 << 64) - 1])
def test_nothing_is_read_outside_of_a_file(directory: Path, place: int) -> None:
    """Whatever offset a header names, nothing is read outside of the file."""
    (directory / "x").write_bytes(b"abcd")
    fd = open_to_look("x")

    assert (b"cd", b"") == (reader(fd, 4)(2, 9), reader(fd, 4)(place, 9))
    os.close(fd)
