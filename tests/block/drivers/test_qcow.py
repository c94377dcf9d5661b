"""qcow: images of version 1, read and written by us and by QEMU."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests import qemu
from tests.helpers_block import Machine, content, discard, flush, read, write
from tests.qcow_images import qcow
from xenbackend.errors import DriverError

SIZE = 1 << 20


def test_both_ways(machine: Machine, tmp_path: Path) -> None:
    """QEMU reads what we wrote and we read what QEMU wrote, over a parent and over compressed clusters."""
    path, base, raw = tmp_path / "a", tmp_path / "base", tmp_path / "raw"
    model = bytearray(Random(1).randbytes(SIZE))
    base.write_bytes(model)
    qemu.qemu_img("create", "-f", "qcow", "-b", base, "-F", "raw", path)
    qemu.qemu_io(path, "qcow", "write -P 7 4096 4096", "write -c -P 8 64k 512")
    model[4096:8192], model[65536 : 65536 + 512] = b"\7" * 4096, b"\x08" * 512
    chain = machine.open(f"qcow:{path},parent_format=raw")
    pieces = {0: b"a" * 1024, 5120: b"b" * 512, 65536: b"c" * 1024, SIZE - 512: b"d" * 512, 300_032: b"e" * 100_352}
    assert [0] * 6 == machine.do(chain, *(write(offset, piece) for offset, piece in pieces.items()), flush())
    for offset, piece in pieces.items():
        model[offset : offset + len(piece)] = piece
    everything = read(0, SIZE)
    assert [0] == machine.do(chain, everything)
    chain.close()
    raw.write_bytes(model)

    assert model == content(everything)
    qemu.qemu_img("compare", "-f", "qcow", "-F", "raw", path, raw)


def test_a_compressed_cluster(machine: Machine, tmp_path: Path) -> None:
    """A compressed cluster can be read, and be written in part."""
    data = Random(1).randbytes(1000).ljust(4096, b"\0")
    (tmp_path / "a").write_bytes(qcow(SIZE, compressed={2: data}))
    chain = machine.open(f"qcow:{tmp_path}/a")
    request = read(8192, 4096)
    assert [0] == machine.do(chain, write(8192 + 512, b"w" * 512))
    assert [0] == machine.do(chain, request)
    chain.close()

    assert data[:512] + b"w" * 512 + data[1024:] == content(request)


def test_the_format_of_a_parent_is_never_guessed(machine: Machine, tmp_path: Path) -> None:
    """An image with a parent does not say which format that has, so the chain must."""
    (tmp_path / "base").write_bytes(b"p" * SIZE)
    (tmp_path / "a").write_bytes(qcow(SIZE, backing=b"base"))
    with pytest.raises(DriverError, match="never guessed; say parent_format=raw"):
        machine.open(f"qcow:{tmp_path}/a")
    chain = machine.open(f"qcow:{tmp_path}/a,parent_format=raw")
    request = read(0, 512)
    machine.do(chain, request)
    chain.close()

    assert b"p" * 512 == content(request)


def test_no_discard(machine: Machine, tmp_path: Path) -> None:
    """No discard is offered, because the format has no way to say that a cluster is free."""
    (tmp_path / "a").write_bytes(qcow(SIZE))
    chain = machine.open(f"qcow:{tmp_path}/a")
    assert [errno.EOPNOTSUPP] == machine.do(chain, discard(0, SIZE))
    chain.close()
