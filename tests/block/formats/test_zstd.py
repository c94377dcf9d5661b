"""Decompression of zstd clusters by the package and by the standard library, with the same tests."""

from __future__ import annotations

import sys
from random import Random
from types import ModuleType

import pytest
import zstandard

from tests.fuzzing import endure
from tests.qcow_images import zstd
from xenbackend.block.formats.qcow2_tables import Unpack, inflate
from xenbackend.block.formats.zstd import OfLibrary, OfPackage, find_unzstd
from xenbackend.errors import DriverError

if sys.version_info >= (3, 14):
    from compression import zstd as library
else:
    from backports import zstd as library

SIZE = 65536
DATA = Random(1).randbytes(SIZE // 4) * 4
UNPACKERS = {"package": OfPackage(zstandard), "library": OfLibrary(library)}
by_both = pytest.mark.parametrize("unpack", UNPACKERS.values(), ids=UNPACKERS)


def with_checksum(data: bytes) -> bytes:
    """Return a frame with a checksum at its end."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def wide(bits: int) -> bytes:
    """Return a frame whose window has 2 to the power of `bits` bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=bits, compression_level=3)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(DATA) + packer.flush()


@pytest.fixture
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a Python whose standard library has zstd. The package backports.zstd is the same code."""
    monkeypatch.setattr(sys, "version_info", max(sys.version_info, (3, 14)))
    compression = ModuleType("compression")
    compression.zstd = library
    monkeypatch.setitem(sys.modules, "compression", compression)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a Python whose standard library has no zstd."""
    monkeypatch.setattr(sys, "version_info", min(sys.version_info, (3, 13)))
    monkeypatch.setitem(sys.modules, "compression", None)


def test_the_host_unpacks() -> None:
    """The decompressor that is found on this host works."""
    assert DATA == find_unzstd()(zstd(DATA), SIZE)


@pytest.mark.usefixtures("with_library")
def test_the_standard_library_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the standard library has zstd, it is used, and no package is needed."""
    packed = zstd(DATA)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    unpack = find_unzstd()

    assert isinstance(unpack, OfLibrary)
    assert DATA == unpack(packed, SIZE)


@pytest.mark.usefixtures("without_library")
def test_an_older_python_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.14 the package is used. If it is not installed, the error says what to install."""
    unpack = find_unzstd()

    assert isinstance(unpack, OfPackage)
    assert DATA == unpack(zstd(DATA), SIZE)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(
        DriverError, match="for which this Python has no package; install python3-zstandard, or zstandard with pip"
    ):
        find_unzstd()


@by_both
@pytest.mark.parametrize(
    "packed",
    [
        zstd(DATA) + b"\xff" * 300,
        zstd(DATA) * 2,
        with_checksum(DATA),
        zstd(DATA[:1000]) + zstd(DATA[1000:]) + b"\1\2",
        b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstd(DATA),
        wide(23),
    ],
    ids=["with what follows it", "with its neighbour", "checksum", "two frames", "skipped frame", "window of 8 MiB"],
)
def test_clusters(unpack: Unpack, packed: bytes) -> None:
    """A cluster is read from one frame or several, and bytes behind it in its last sector are ignored."""
    assert DATA == unpack(packed, SIZE)


@by_both
@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (b"", "gives 0 bytes and not 65536"),
        (bytes(512), "cannot be read"),
        (zstd(DATA)[:-5], "gives 0 bytes"),
        (zstd(DATA[:-1]), "gives 65535 bytes"),
        (zstd(DATA + b"x"), "gives more bytes"),
        (zstd(bytes(1 << 28)), "gives more bytes"),
        (with_checksum(DATA)[:-4] + b"xxxx", "cannot be read.*checksum"),
        (wide(24), "cannot be read.*too much memory"),
        (zstd(b"") * 1000 + zstd(DATA[:9]), "gives [09] bytes"),
    ],
)
def test_damaged_clusters(unpack: Unpack, packed: bytes, sentence: str) -> None:
    """Compressed data that give too few or too many bytes, or need too much memory, count as damaged."""
    with pytest.raises(DriverError, match=sentence):
        unpack(packed, SIZE)


@pytest.mark.parametrize("unpack", [*UNPACKERS.values(), inflate], ids=[*UNPACKERS, "deflate"])
def test_any_bytes_are_a_cluster_or_a_sentence(request: pytest.FixtureRequest, unpack: Unpack) -> None:
    """R19: any bytes as a compressed cluster are accepted or raise DriverError, quickly and in little memory."""
    chance = Random(request.config.getoption("--seed"))
    good = with_checksum(DATA[:4096]) + zstd(bytes(4096)) + zstd(DATA[:2000]) + zstd(DATA[2000:4096])

    def damaged() -> bytes:
        data = bytearray(good[chance.choice([0, 0, chance.randrange(len(good))]) :])
        for _ in range(chance.randint(1, 4)):
            place = chance.choice([chance.randrange(32), chance.randrange(len(data))]) % len(data)
            data[place] = chance.choice([0, 255, chance.randrange(256)])
        return bytes(data)

    def look(data: bytes) -> None:
        assert 4096 == len(unpack(data, 4096))

    assert 0 < endure(request.config.getoption("--requests") // 20, damaged, look)
