"""The driver vhd on real files, compared with QEMU."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from shutil import which

import pytest
from descriptors import open_descriptors

from tests import libvhdi, vhd_images
from tests.helpers_block import Machine, content, discard, flush, read, write
from xenbackend.block.chain import Chain
from xenbackend.block.drivers.vhd import Vhd
from xenbackend.block.formats import vhd
from xenbackend.errors import ConfigError, DriverError
from xenbackend.image.create import create, snapshot
from xenbackend.image.names import find_image
from xenbackend.image.resize import resize
from xenbackend.kernel import blockdev

MIB = 1 << 20
needs_qemu = pytest.mark.skipif(not which("qemu-img"), reason="qemu-utils is not installed")
P = b"p" * 16


def qemu_img(*arguments: object) -> None:
    """Run qemu-img."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def blocks(content: bytes, block_size: int = 2 * MIB) -> dict[int, dict[int, bytes]]:
    """Return the sectors of a disk that are not zeros, by block."""
    found: dict[int, dict[int, bytes]] = {}
    for place in range(0, len(content), 512):
        if any(content[place : place + 512]):
            found.setdefault(place // block_size, {})[place % block_size // 512] = content[place : place + 512]
    return found


def put(path: Path, data: bytes) -> Path:
    """Write a file, padded to the sector size of `aio:`."""
    path.write_bytes(data)
    return path


def exercise(machine: Machine, chain: Chain, model: bytearray, chance: Random, count: int) -> None:
    """Send random batches that do not overlap, and compare every read with the model."""
    for _ in range(count):
        batch, expected, place = [], [], chance.randrange(0, len(model) // 2 // 512) * 512
        for _ in range(chance.randint(1, 8)):
            place += chance.choice([0, 0, 512, 4096, 256 * 1024])
            length = min(chance.choice([512, 4096, 4096, 65536, 3 * MIB]), len(model) - place)
            if length <= 0:
                break
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                batch.append(write(place, data))
                model[place : place + length] = data
                expected.append(b"")
            else:
                batch.append(read(place, length))
                expected.append(bytes(model[place : place + length]))
            place += length
        assert [0] * len(batch) == machine.do(chain, *batch)
        for request, data in zip(batch, expected, strict=True):
            assert not data or data == content(request)


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=dynamic,force_size", "subformat=fixed,force_size"])
def test_what_we_write_qemu_reads(
    machine: Machine, tmp_path: Path, options: str, cache: str, request: pytest.FixtureRequest
) -> None:
    """Random requests have the same effect as on an array of bytes, for us and for QEMU, which can then write on."""
    path, raw = tmp_path / "img.vhd", tmp_path / "img.raw"
    qemu_img("create", "-q", "-f", "vpc", "-o", options, path, 20 * MIB)
    chain = machine.open(f"vhd:{path},cache={cache}")
    model = bytearray(chain.geometry.size)
    chance = Random(request.config.getoption("--seed"))
    exercise(machine, chain, model, chance, request.config.getoption("--requests") // 400)
    assert [0] == machine.do(chain, flush())
    chain.close()
    raw.write_bytes(model)
    kind = ["-f", "vpc", "-F", "raw"]
    qemu_img("compare", *kind, path, raw)

    subprocess.run(["qemu-io", "-f", "vpc", "-c", "write -P 7 9M 3M", path], check=True, capture_output=True)
    model[9 * MIB : 12 * MIB] = b"\7" * (3 * MIB)
    chain = machine.open(f"vhd:{path},cache={cache}")
    exercise(machine, chain, model, chance, 10)
    assert model == machine.everything(chain)
    chain.close()
    raw.write_bytes(model)
    qemu_img("compare", *kind, path, raw)


@needs_qemu
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_what_qemu_writes_we_read(machine: Machine, tmp_path: Path, subformat: str) -> None:
    """We read an image that QEMU converted as its original."""
    raw = put(tmp_path / "img.raw", Random(1).randbytes(5 * MIB).ljust(9 * MIB, b"\0"))
    path = tmp_path / "img.vhd"
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat},force_size", raw, path)
    chain = machine.open(f"vhd:{path}", read_only=True)
    found = machine.everything(chain)
    chain.close()

    assert raw.read_bytes() == found


@pytest.mark.parametrize(("size", "block_size"), [(2 << 40, 2 << 20), (1 << 30, 16 << 20)])
def test_what_was_made_before_is_served(machine: Machine, tmp_path: Path, size: int, block_size: int) -> None:
    """Disks and blocks larger than those of a new image can be read and written. Such a disk cannot grow."""
    path = tmp_path / "old.vhd"
    path.write_bytes(vhd_images.image(size, {1: {0: b"o" * 512}}, block_size=block_size))
    chain = machine.open(f"vhd:{path}")
    found = read(block_size, 512)
    assert [0, 0] == machine.do(chain, found, write(size - 512, b"e" * 512))
    last = read(size - 512, 512)
    assert [0] == machine.do(chain, last)
    chain.close()

    assert (b"o" * 512, b"e" * 512) == (content(found), content(last))
    with pytest.raises(ConfigError, match="holds up to 2040 GiB"):
        resize(find_image(f"vhd:{path}"), (2 << 40) + 512)


@needs_qemu
@pytest.mark.parametrize("size", [1 << 40, 2040 << 30])
def test_large_disks(machine: Machine, tmp_path: Path, size: int) -> None:
    """On disks up to 2 TiB, the last sector can be written by us and by QEMU."""
    path = tmp_path / "img.vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "force_size", path, size)
    chain = machine.open(f"vhd:{path}")
    assert size == chain.geometry.size
    assert [0, 0] == machine.do(chain, write(size - 512, b"e" * 512), write(size // 2, b"m" * 512))
    chain.close()
    found = subprocess.run(
        [
            "qemu-io",
            "-r",
            "-f",
            "vpc",
            "-c",
            f"read -P 101 {size - 512} 512",
            "-c",
            f"read -P 109 {size // 2} 512",
            path,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert "verification failed" not in found


def test_a_written_down_chain(machine: Machine, tmp_path: Path) -> None:
    """A grandparent, a parent and a child that are given byte by byte read as the right disk, to the last sector."""
    size = 5 * MIB
    put(tmp_path / "a.vhd", vhd_images.image(size, {0: {0: b"a" * 512, 1: b"a" * 512}, 2: {7: b"a" * 512}}, uuid=P))
    put(
        tmp_path / "b.vhd",
        vhd_images.image(
            size,
            {0: {1: b"b" * 512, 9: b"b" * 512}},
            uuid=b"q" * 16,
            parent_uuid=P,
            names=[(b"MacX", b"file://./a.vhd")],
        ),
    )
    child = vhd_images.image(
        size, {0: {9: b"c" * 512}}, parent_uuid=b"q" * 16, names=[(b"W2ru", ".\\b.vhd".encode("utf-16-le"))]
    )
    put(tmp_path / "c.vhd", child)
    chain = machine.open(f"vhd:{tmp_path}/c.vhd")
    found = machine.everything(chain)
    assert [f"vhd:{tmp_path}/{name}.vhd" for name in "cba"] == [layer.text for layer in chain.layers]
    model = bytearray(size)
    for sector, letter in ((0, b"a"), (1, b"b"), (9, b"c"), (2 * 4096 + 7, b"a")):
        model[sector * 512 : sector * 512 + 512] = letter * 512
    assert model == found

    others = [(tmp_path / name).read_bytes() for name in ("a.vhd", "b.vhd")]
    exercise(machine, chain, model, Random(1), 12)
    assert model == machine.everything(chain)
    chain.close()
    assert others == [(tmp_path / name).read_bytes() for name in ("a.vhd", "b.vhd")]


def test_another_implementation_reads_our_chains(machine: Machine, tmp_path: Path) -> None:
    """Of eight images over one another that we made and wrote to, page by page, libvhdi reads every byte as we do."""
    create("vhd", f"{tmp_path}/0", 5 * MIB + 512)
    text, model, chance = f"vhd:{tmp_path}/0", bytearray(5 * MIB + 512), Random(1)
    for number in range(1, 10):
        chain = machine.open(text)
        pages = chance.sample(range(len(model) // 4096), 40)  # libvhdi takes a byte of a bitmap as all set or all clear
        batch = [write(page * 4096, chance.randbytes(4096)) for page in pages]
        assert [0] * 40 == machine.do(chain, *batch)
        chain.close()
        for page, request in zip(pages, batch, strict=True):
            model[page * 4096 : page * 4096 + 4096] = content(request)
        if number < 9:
            text = snapshot(find_image(text), f"{tmp_path}/{number}").text
    paths = [tmp_path / str(each) for each in reversed(range(9))]

    assert model == libvhdi.pieces(paths, [(0, len(model))])


def test_a_raw_parent(machine: Machine, tmp_path: Path) -> None:
    """A parent with UUID zero is a raw image, as in libvhd. It opens as `aio:`, even if smaller than its child."""
    base = put(tmp_path / "base.raw", Random(1).randbytes(3 * MIB))
    names = [(b"W2ru", ".\\base.raw".encode("utf-16-le"))]
    put(tmp_path / "img.vhd", vhd_images.image(5 * MIB, {1: {1: b"c" * 512}}, parent_uuid=bytes(16), names=names))
    chain = machine.open(f"vhd:{tmp_path}/img.vhd")
    found = machine.everything(chain)
    assert f"aio:{base}" == chain.layers[1].text
    chain.close()
    model = bytearray(base.read_bytes().ljust(5 * MIB, b"\0"))
    model[2 * MIB + 512 : 2 * MIB + 1024] = b"c" * 512

    assert model == found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("uuid", "has another UUID than the one this image was made for; use the right parent, or add changed=accept"),
        ("time", "was changed after this image was made"),
        ("gone", "its parent is not there: the image names './base.vhd', 'base.vhd'"),
        ("away", "base.vhd is /.*/base.vhd, and is named only by the image; if it is the right one, allow it with"),
    ],
)
def test_a_parent_that_is_not_right(tmp_path: Path, change: str, sentence: str) -> None:
    """A parent that was replaced, altered, moved or linked elsewhere is refused, and the advice in the error works."""
    directory = tmp_path / "images"
    directory.mkdir()
    machine = Machine(parents=[str(directory)])
    base = put(directory / "base.vhd", vhd_images.image(MIB, uuid=b"x" * 16 if change == "uuid" else P))
    os.utime(base, (0, vhd.EPOCH + 1000 + 10 * (change == "time")))
    names = [(b"W2ru", ".\\base.vhd".encode("utf-16-le"))]
    image = vhd_images.image(MIB, parent_uuid=P, parent_timestamp=1000, names=names, creator=b"win ")
    put(directory / "img.vhd", image)
    if change in {"gone", "away"}:
        base.rename(tmp_path / "base.vhd")
    if change == "away":
        base.symlink_to("../base.vhd")
    with pytest.raises(DriverError, match=sentence) as caught:
        machine.open(f"vhd:{directory}/img.vhd")
    assert caught.value.errno in {errno.ESTALE, errno.ENOENT, errno.EACCES}

    ways = {"uuid": ",changed=accept", "time": ",changed=accept", "away": f",parents={tmp_path}"}
    if change in ways:
        machine.open(f"vhd:{directory}/img.vhd{ways[change]}").close()
    machine.close()


def test_blktap_does_not_keep_times(machine: Machine, tmp_path: Path) -> None:
    """A parent's time of change is not checked, because blktap alters parents (marks them hidden) on its own."""
    put(tmp_path / "base.vhd", vhd_images.image(MIB, uuid=P))
    names = [(b"MacX", b"file://./base.vhd")]
    put(tmp_path / "img.vhd", vhd_images.image(MIB, parent_uuid=P, parent_timestamp=1000, names=names))

    machine.open(f"vhd:{tmp_path}/img.vhd").close()


@pytest.mark.rows("D11")
def test_a_chain_that_bites_its_tail(machine: Machine, tmp_path: Path) -> None:
    """D11: an image that names itself as its parent is refused."""
    names = [(b"MacX", b"file://./img.vhd")]
    put(tmp_path / "img.vhd", vhd_images.image(MIB, uuid=P, parent_uuid=P, names=names))
    with pytest.raises(DriverError, match="is the same file as the image or one of its children"):
        machine.open(f"vhd:{tmp_path}/img.vhd")


def test_the_batmap_is_used_and_kept(machine: Machine, tmp_path: Path) -> None:
    """Blocks that the batmap says are full need no bitmap. Closing adds the blocks that have become full."""
    names = [(b"MacX", b"file://./base.vhd")]
    put(tmp_path / "base.vhd", vhd_images.image(8 * MIB, uuid=P))
    full = dict.fromkeys(range(4096), b"f" * 512)
    start = vhd_images.image(8 * MIB, {0: full, 2: {0: b"x" * 512}}, parent_uuid=P, names=names, full=[0])
    path = put(tmp_path / "img.vhd", start)
    chain = machine.open(f"vhd:{path}")
    assert [0] == machine.do(chain, write(4 * MIB, b"n" * 2 * MIB))
    chain.close()
    after = path.read_bytes()
    bits = 2048 + 512  # behind header, table and the batmap's header

    assert b"\x80" == start[bits : bits + 1]
    assert b"\xa0" == after[bits : bits + 1]
    chain = machine.open(f"vhd:{path}")
    driver = chain.layers[0].driver
    assert isinstance(driver, Vhd)
    assert b"\1\0\1\0" == driver._batmap.blocks if driver._batmap else None
    assert b"f" * 2 * MIB + bytes(2 * MIB) + b"n" * 2 * MIB + bytes(2 * MIB) == machine.everything(chain)
    chain.close()


@pytest.mark.parametrize("cut", [512, 1024, MIB])
def test_an_end_that_is_missing(machine: Machine, tmp_path: Path, cut: int) -> None:
    """If a writer was killed inside its last block, the missing part reads as zeros, and the file is completed."""
    full = dict.fromkeys(range(4096), b"f" * 512)
    path = put(tmp_path / "img.vhd", vhd_images.image(8 * MIB, {1: full})[:-cut])
    chain = machine.open(f"vhd:{path}", read_only=True)
    before = machine.everything(chain)
    chain.close()
    assert bytes(2 * MIB) + (b"f" * (2 * MIB - cut + 512)).ljust(2 * MIB, b"\0") + bytes(4 * MIB) == before

    chain = machine.open(f"vhd:{path}")
    assert before == machine.everything(chain)
    assert [0] == machine.do(chain, write(2 * MIB, b"w" * 2 * MIB))
    chain.close()
    data = path.read_bytes()
    assert vhd.read_footer(lambda offset, length: data[offset : offset + length], len(data))[1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: bytes(MIB), "it is not a VHD image"),
        (lambda: vhd_images.fixed(bytes(MIB))[512:], "too few for its disk"),
        (lambda: vhd_images.image(8 * MIB, {0: {}, 1: {}})[:MIB], "more blocks than fit into the file|beyond the end"),
    ],
)
def test_what_is_no_image(machine: Machine, tmp_path: Path, make: Callable[[], bytes], sentence: str) -> None:
    """A file that is not a VHD image, or has lost its end, is refused unchanged, and nothing stays open."""
    path = put(tmp_path / "img.vhd", make())
    before, counts = path.read_bytes(), []
    for _ in range(2):
        with pytest.raises(DriverError, match=sentence):
            machine.open(f"vhd:{path}")
        counts.append(len(open_descriptors()))

    assert before == path.read_bytes()
    assert counts[0] == counts[1]


def test_a_footer_without_its_last_byte(machine: Machine, tmp_path: Path) -> None:
    """Virtual PC once wrote footers of 511 bytes. They can be read, since the last byte means nothing."""
    path = put(tmp_path / "img.vhd", vhd_images.fixed(b"x" * MIB)[:-1])
    chain = machine.open(f"vhd:{path}", read_only=True)
    found = machine.everything(chain)
    chain.close()

    assert b"x" * MIB == found
    with pytest.raises(DriverError, match="not a multiple of its 512 byte sectors; attach the disk read-only"):
        machine.open(f"vhd:{path}")


def test_a_fixed_disk_is_its_file(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed disk has the capabilities and the physical sector of its file. The guest cannot reach its footer."""
    monkeypatch.setattr(blockdev, "_unit_of_file", lambda _fd: 4096)
    path = put(tmp_path / "img.vhd", vhd_images.fixed(b"x" * MIB))
    chain = machine.open(f"vhd:{path}")
    assert MIB == chain.geometry.size
    assert 4096 == chain.geometry.physical_sector_size
    assert [0, 0] == machine.do(chain, write(MIB - 512, b"e" * 512), flush())
    if chain.geometry.can_discard:
        assert [0] == machine.do(chain, discard(0, 65536))
    found = machine.everything(chain)
    chain.close()

    assert path.read_bytes() == found + vhd_images.fixed(b"x" * MIB)[-512:]
    assert b"e" * 512 == found[-512:]
