"""What an image still has beyond its disk's end, from when it was larger: a disk that grows shows zeros there."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.image_content import assert_same_for_qemu, disk_content, disk_write
from tests.qcow_images import qcow, qcow2
from tests.vhd_images import fixed
from tests.vhd_images import image as vhd_image
from xenbackend.block.driver import File
from xenbackend.block.formats import vhd
from xenbackend.block.formats.common import Plan
from xenbackend.image import writing
from xenbackend.image.behind import zeros
from xenbackend.image.check import CLEAN, ERRORS, LEAKS, check
from xenbackend.image.formats.vhd import Vhd
from xenbackend.image.names import Image, find_image
from xenbackend.image.resize import resize
from xenbackend.image.session import Session

pytestmark = pytest.mark.usefixtures("parents_anywhere")

SIZE = 1 << 20
BLOCK = 64 << 10  # for VHD
Clusters = dict[int, bytes]


def content(cluster: int, chance: Random, *, share: float = 0.7) -> Clusters:
    """Return a disk's content by cluster. Some clusters are absent."""
    pattern = [chance.randbytes(64) * (cluster // 64) for _ in range(3)]  # it can be compressed
    return {number: chance.choice(pattern) for number in range(SIZE // cluster) if chance.random() < share}


def flat(clusters: Mapping[int, bytes], cluster: int, size: int = SIZE) -> bytes:
    """Return the content of the whole disk."""
    return b"".join(clusters.get(number, bytes(cluster)) for number in range(SIZE // cluster))[:size]


def vhd_with(clusters: Clusters, **more: object) -> bytes:
    """Return a VHD image with these blocks."""
    blocks = {
        number: {sector: data[sector * 512 :][:512] for sector in range(BLOCK // 512)}
        for number, data in clusters.items()
    }
    return vhd_image(SIZE, blocks, block_size=BLOCK, **more)


def half(clusters: Clusters, *, odd: bool) -> Clusters:
    """Return every other cluster."""
    return {number: data for number, data in clusters.items() if number % 2 == odd}


KINDS: dict[str, tuple[str, int, Callable[[Clusters], bytes]]] = {
    "vhd": ("vhd", BLOCK, vhd_with),
    "vhd, full": ("vhd", BLOCK, lambda clusters: vhd_with(clusters, full=sorted(clusters))),
    "vhd, fixed": ("vhd", BLOCK, lambda clusters: fixed(flat(clusters, BLOCK))),
    "qcow2": ("qcow2", 4096, lambda clusters: qcow2(SIZE, clusters)),
    "qcow2, 512": ("qcow2", 512, lambda clusters: qcow2(SIZE, clusters, cluster_bits=9)),
    "qcow2, snapshot": ("qcow2", 4096, lambda clusters: qcow2(SIZE, clusters, snapshot=True)),
    "qcow2, 512, snapshot": ("qcow2", 512, lambda clusters: qcow2(SIZE, clusters, cluster_bits=9, snapshot=True)),
    "qcow2, compressed": (
        "qcow2",
        4096,
        lambda clusters: qcow2(SIZE, half(clusters, odd=False), compressed=half(clusters, odd=True)),
    ),
    "qcow": ("qcow", 4096, lambda clusters: qcow(SIZE, clusters)),
    "qcow, 512": ("qcow", 512, lambda clusters: qcow(SIZE, clusters, cluster_bits=9, l2_bits=6)),
    "qcow, compressed": (
        "qcow",
        4096,
        lambda clusters: qcow(SIZE, half(clusters, odd=False), compressed=half(clusters, odd=True)),
    ),
}


def cut(data: bytes, size: int) -> bytes:
    """Return an image whose disk ends earlier, but which still has the former content behind that end."""
    if data.startswith(b"QFI"):
        return data[:24] + size.to_bytes(8, "big") + data[32:]
    footer, _ = vhd.read_footer(lambda offset, length: data[offset : offset + length], len(data))
    packed = vhd.pack_footer(replace(footer, current_size=size, geometry=vhd.geometry_of(size)))
    start = b"" if footer.type == vhd.FIXED else packed
    return start + data[len(start) : -512] + packed


def made(kind: str, directory: Path, chance: Random) -> tuple[Image, bytes]:
    """Make an image of a kind whose disk was cut at a random place, and return it with the disk's content."""
    image_format, cluster, make = KINDS[kind]
    clusters = content(cluster, chance)
    size = chance.choice([chance.randrange(512, SIZE, 512), chance.randrange(cluster, SIZE, cluster)])
    path = directory / f"disk.{image_format}"
    path.write_bytes(cut(make(clusters), size))
    return find_image(f"{image_format}:{path}"), flat(clusters, cluster, size)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_is_zeros(kind: str, tmp_path: Path) -> None:
    """Whatever an image had beyond its end, a disk that grows shows zeros there, for QEMU too, and keeps its content.

    The new part can be written. Only QCOW2 can free the clusters that were beyond the end.
    """
    for seed in range(4):
        chance = Random(f"{kind} {seed}")
        image, before = made(kind, tmp_path, chance)
        size = chance.choice([SIZE, chance.randrange(len(before), SIZE + 1, 512), 2 * SIZE + 512])
        if kind == "vhd, full":
            size = min(size, SIZE)
        assert len(before) == resize(image, size)
        expected = bytearray(before.ljust(size, b"\0"))

        assert expected == disk_content(image.text), seed
        assert check(image).status in ((CLEAN,) if image.format == "qcow2" else (CLEAN, LEAKS))
        (tmp_path / "raw").write_bytes(expected)
        assert_same_for_qemu(Path(image.path), image.format, tmp_path / "raw")
        disk_write(image.text, {size - 512: b"n" * 512})
        expected[-512:] = b"n" * 512
        assert expected == disk_content(image.text), seed


@pytest.mark.parametrize("kind", ["qcow2, snapshot", "qcow2, 512, snapshot"])
def test_a_snapshot_keeps_what_it_has(kind: str, tmp_path: Path) -> None:
    """A snapshot of a larger disk still has the content beyond the present end after the disk has grown."""
    _, cluster, make = KINDS[kind]
    for seed in range(4):
        chance = Random(seed)
        clusters = content(cluster, chance)
        size = chance.randrange(512, SIZE, 512)
        path = tmp_path / "disk.qcow2"
        path.write_bytes(cut(make(clusters), size))
        resize(find_image(f"qcow2:{path}"), SIZE)
        qemu.qemu_img("snapshot", "-a", "a", path)

        assert flat(clusters, cluster) == disk_content(f"qcow2:{path}")
        assert (0, 0) == qemu.check(path)


def test_a_child_grows_over_what_it_had(tmp_path: Path) -> None:
    """A child with old sectors beyond its end shows zeros there after it has grown, and the parent's data before."""
    parent = dict.fromkeys(range(4), b"p" * BLOCK)
    names = [(b"MacX", b"file://./base.vhd")]
    base = cut(vhd_with(parent, uuid=b"p" * 16), 3 * BLOCK + 512)
    (tmp_path / "base.vhd").write_bytes(base)
    child = vhd_with({1: b"c" * BLOCK, 3: b"d" * BLOCK, 9: b"e" * BLOCK}, parent_uuid=b"p" * 16, names=names)
    (tmp_path / "child.vhd").write_bytes(cut(child, 3 * BLOCK + 1024))
    image = find_image(f"vhd:{tmp_path}/child.vhd")
    resize(image, SIZE)

    expected = b"p" * BLOCK + b"c" * BLOCK + b"p" * BLOCK + b"d" * 1024
    assert expected.ljust(SIZE, b"\0") == disk_content(image.text)


def test_a_map_of_full_blocks_forgets_what_is_behind(tmp_path: Path) -> None:
    """When the disk grows, the map of full blocks no longer calls blocks beyond the former end full."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(cut(vhd_with({1: b"a" * BLOCK, 9: b"b" * BLOCK}, full=[1, 9]), 2 * BLOCK))
    place = path.read_bytes().index(b"tdbatmap") + 512
    assert b"\x40\x40" == path.read_bytes()[place : place + 2]
    resize(find_image(f"vhd:{path}"), SIZE)

    assert b"\x40\0" == path.read_bytes()[place : place + 2]


def test_a_fixed_disk_in_a_longer_file(tmp_path: Path) -> None:
    """When a fixed disk grows, bytes between it and its footer are cleared, even if the file is long enough."""
    path = tmp_path / "disk.vhd"
    footer = fixed(bytes(BLOCK))[-512:]
    for size in (2 * BLOCK, 3 * BLOCK, 8 * BLOCK):
        path.write_bytes(b"a" * BLOCK + b"?" * 3 * BLOCK + footer)
        resize(find_image(f"vhd:{path}"), size)
        found = disk_content(f"vhd:{path}")

        assert (b"a" * BLOCK).ljust(size, b"\0") == found
        assert CLEAN == check(find_image(f"vhd:{path}")).status


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vhd, fixed"])
def test_whoever_is_killed_shows_nothing_old(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any write, the disk has its old size and content, or its new size with zeros, and no errors."""
    write_plan, left = writing.write_plan, 0

    def killed(file: File, plan: Plan) -> None:
        nonlocal left
        for each in (write for writes in plan for write in writes):
            if not left:
                raise OSError(errno.EIO, "killed")
            left -= 1
            write_plan(file, [[each]])

    monkeypatch.setattr(writing, "write_plan", killed)
    image, before = made(kind, tmp_path, Random(0))
    start = Path(image.path).read_bytes()
    for after in range(0, 1000, 7 if "512" in kind else 1):
        Path(image.path).write_bytes(start)
        left = after
        try:
            resize(image, SIZE if kind == "vhd, full" else 2 * SIZE)
        except OSError:
            found = check(image)
            assert found.status != ERRORS or (image.format == "vhd" and found.errors == 1), after
            assert disk_content(image.text) in (before, before.ljust(2 * SIZE, b"\0"), before.ljust(SIZE, b"\0"))
        else:
            break
    assert after > 1


def test_a_killed_fixed_disk_has_a_footer(tmp_path: Path) -> None:
    """While a fixed disk grows, after every write a footer is at the file's end and the new part is zeros."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(fixed(b"a" * BLOCK))
    with Session() as session:
        file = session.open_file(str(path), read_only=False, step=512)
        seen = []
        for name in ("write_at", "grow", "sync"):
            monitor(file, name, lambda: seen.append(path.read_bytes()))
        Vhd().grow(file, 2 * BLOCK, on_device=False)

    assert len(seen) > 5
    for data in seen:
        footer, is_at_end = vhd.read_footer(lambda offset, length, data=data: data[offset : offset + length], len(data))
        assert is_at_end
        assert (b"a" * BLOCK).ljust(footer.size, b"\0") == data[: footer.size]


def monitor(file: object, name: str, look: Callable[[], None]) -> None:
    """Call `look` after each call of a file's method."""
    method = getattr(file, name)

    def call(*arguments: object) -> object:
        try:
            return method(*arguments)
        finally:
            look()

    setattr(file, name, call)


def test_only_what_is_no_zero_is_cleared() -> None:
    """Only stretches that are not zeros yet are written, so holes are kept."""
    data = bytes(1 << 20) + b"x" + bytes((1 << 20) - 1) + bytes(512)

    assert [(1 << 20, bytes(1 << 20))] == list(zeros(lambda at, length: data[at : at + length], 0, len(data)))
    assert [] == list(zeros(lambda at, length: data[at : at + length], 5, 5))
