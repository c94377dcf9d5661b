"""The table of QCOW2's features in the manual: each row is checked on images that qemu-img made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.helpers_block import Machine, flush, write
from tests.qemu import qemu_img, qemu_io
from xenbackend.block.drivers import qcow2 as driver
from xenbackend.errors import DriverError

SIZE = 1 << 20
_BITS = {"incompatible": 72, "compatible": 80, "autoclear": 88}  # offsets of the features of each kind in the header
_SECRET = ("--object", "secret,id=s,data=secret")
Make = Callable[[Path], list[Path]]


def table() -> dict[str, tuple[bool, bool]]:
    """Return the table of the manual: for each feature, whether it is read and whether it is written."""
    rows = re.findall(r"^        (\S.*?)  +(yes|no) +(yes|no)(?: |$)", driver.__doc__ or "", re.MULTILINE)
    return {feature: (reads == "yes", writes == "yes") for feature, reads, writes in rows}


def created(*options: str, commands: tuple[str, ...] = ("write -P 1 0 200k", "write -P 2 700k 1k")) -> Make:
    """Return a function that makes images with each of these options and lets QEMU write to them."""

    def make(path: Path) -> list[Path]:
        made = []
        for number, option in enumerate(options):
            made.append(path / f"{number}.qcow2")
            qemu_img("create", "-f", "qcow2", "-o", option.format(directory=path), made[-1], str(SIZE))
            qemu_io(made[-1], "qcow2", *commands)
        return made

    return make


def patched(kind: str, bit: int) -> Make:
    """Return a function that makes an image and then sets a feature in its header."""

    def make(path: Path) -> list[Path]:
        (image,) = created("compat=1.1")(path)
        data = bytearray(image.read_bytes())
        data[_BITS[kind] + 7 - bit // 8] |= 1 << bit % 8
        image.write_bytes(data)
        return [image]

    return make


def backed(path: Path) -> list[Path]:
    """Make an image with a backing file."""
    (path / "base").write_bytes(Random(1).randbytes(SIZE))
    qemu_img("create", "-f", "qcow2", "-b", path / "base", "-F", "raw", path / "a.qcow2")
    qemu_io(path / "a.qcow2", "qcow2", "write -P 1 64k 100k")
    return [path / "a.qcow2"]


def compressed(kind: str) -> Make:
    """Return a function that makes an image with compressed clusters."""

    def make(path: Path) -> list[Path]:
        (path / "base").write_bytes(Random(1).randbytes(64) * (SIZE // 64))
        options = ("-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}")
        qemu_img("convert", *options, path / "base", path / "a.qcow2")
        return [path / "a.qcow2"]

    return make


def encrypted(path: Path) -> list[Path]:
    """Make an image encrypted by AES."""
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu_img("create", "-f", "qcow2", *_SECRET, "-o", options, path / "a.qcow2", str(SIZE))
    return [path / "a.qcow2"]


def with_number(place: int, number: int, size: int) -> Make:
    """Return a function that makes an image and then writes a number of so many bytes to its header."""

    def make(path: Path) -> list[Path]:
        (image,) = created("compat=1.1")(path)
        data = bytearray(image.read_bytes())
        data[place : place + size] = number.to_bytes(size, "big")
        image.write_bytes(data)
        return [image]

    return make


def with_snapshot(path: Path) -> list[Path]:
    """Make an image with a snapshot and with data written after it."""
    (image,) = created("compat=1.1")(path)
    qemu_img("snapshot", "-c", "before", image)
    qemu_io(image, "qcow2", "write -P 3 100k 200k")
    return [image]


def with_bitmap(path: Path) -> list[Path]:
    """Make an image with a persistent bitmap."""
    (image,) = created("compat=1.1")(path)
    qemu_img("bitmap", "--add", image, "changes")
    qemu_io(image, "qcow2", "write -P 3 100k 200k")
    return [image]


def with_extension(path: Path) -> list[Path]:
    """Make an image with a header extension of an unknown type, in the place of its table of feature names."""
    (image,) = created("compat=1.1")(path)
    data = image.read_bytes()
    place = data.index(bytes.fromhex("6803f857"))
    image.write_bytes(data[:place] + b"\x12\x34\x56\x78" + data[place + 4 :])
    return [image]


MAKERS: dict[str, Make] = {
    "version 2": created("compat=0.10"),
    "version 3": created("compat=1.1"),
    "clusters of 512 bytes to 2 MiB": created(*(f"cluster_size={1 << bits}" for bits in (9, 16, 21))),
    "refcounts of 1 to 64 bits": created(*(f"refcount_bits={1 << order}" for order in range(7))),
    "backing file": backed,
    "clusters compressed by deflate": compressed("zlib"),
    "clusters compressed by zstd": compressed("zstd"),
    "internal snapshots": with_snapshot,
    "persistent bitmaps": with_bitmap,
    "lazy refcounts": created("lazy_refcounts=on"),
    "external data file": created("data_file={directory}/data"),
    "raw external data file": created("data_file={directory}/data,data_file_raw=on"),
    "subclusters (extended L2)": created("extended_l2=on"),
    "dirty": patched("incompatible", 0),
    "corrupt": patched("incompatible", 1),
    "encryption by AES": encrypted,
    "encryption by LUKS": with_number(32, 2, 4),  # as QEMU would take seconds to make one
    "unknown header extension": with_extension,
    "unknown compatible feature": patched("compatible", 40),
    "unknown auto-clear feature": patched("autoclear", 40),
    "unknown incompatible feature": patched("incompatible", 40),
    "size not in whole sectors": with_number(24, SIZE - 1, 8),
}


def layer_of(image: Path) -> str:
    """Return the layer with which an image may be written, if it can be."""
    data = image.parent / "data"
    return f"qcow2:{image}" + (f",data_file={data}" if data.exists() else "")


def test_every_feature_has_a_row() -> None:
    """The table has a row for each feature that is tried here, and no other."""
    assert set(MAKERS) == set(table())


@pytest.mark.slow
@pytest.mark.parametrize("feature", MAKERS)
def test_the_table_is_true(machine: Machine, tmp_path: Path, feature: str) -> None:
    """What the table calls readable reads as in QEMU. What it calls writable is read by QEMU afterwards without a
    fault. The rest is refused.
    """
    reads, writes = table()[feature]
    for image in MAKERS[feature](tmp_path):
        raw, text = tmp_path / "raw", layer_of(image)
        if not reads:
            with pytest.raises(DriverError):
                machine.open(text, read_only=True)
        else:
            qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", image, raw)
            assert raw.read_bytes() == machine.contents(f"qcow2:{image}")
        if not writes:
            before = image.read_bytes()
            with pytest.raises(DriverError):
                machine.open(text)
            assert before == image.read_bytes()[: len(before)]
            continue
        model = bytearray(raw.read_bytes())
        model[3072:200_192] = Random(2).randbytes(197_120)
        chain = machine.open(text)
        assert [0, 0] == machine.do(chain, write(3072, bytes(model[3072:200_192])), flush())
        chain.close()
        raw.write_bytes(model)
        assert bytes(model) == machine.contents(f"qcow2:{image}")
        qemu_img("compare", "-f", "qcow2", "-F", "raw", image, raw)
        errors, leaks = qemu.check(image)
        assert (0, feature == "persistent bitmaps") == (errors, leaks > 0)  # no table refers to those clusters any more


@pytest.mark.slow
def test_what_the_table_says_besides(machine: Machine, tmp_path: Path) -> None:
    """Snapshots, extensions, compatible features, raw data files stay. Bitmaps and auto-clear features do not."""
    for feature in ("internal snapshots", "unknown header extension", "unknown compatible feature",
                    "unknown auto-clear feature", "persistent bitmaps", "raw external data file"):  # fmt: skip
        directory = tmp_path / feature
        directory.mkdir()
        (image,) = MAKERS[feature](directory)
        before = image.read_bytes()[:512]
        if feature == "internal snapshots":
            qemu_img("convert", "-l", "before", "-f", "qcow2", "-O", "raw", image, directory / "old")
        chain = machine.open(layer_of(image))
        assert [0, 0] == machine.do(chain, write(0, b"w" * 4096), flush())
        chain.close()
        after = image.read_bytes()[:512]

        assert (before[:88], before[96:]) == (after[:88], after[96:])
        assert after[88:96] == bytes(7) + (b"\2" if feature == "raw external data file" else b"\0")
        if feature == "internal snapshots":
            qemu_img("convert", "-l", "before", "-f", "qcow2", "-O", "raw", image, directory / "new")
            assert (directory / "old").read_bytes() == (directory / "new").read_bytes()
        if feature == "raw external data file":
            assert b"w" * 4096 + b"\1" * 4096 == (directory / "data").read_bytes()[:8192]
