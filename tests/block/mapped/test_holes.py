"""Tests of `xenbackend.block.mapped.holes`: discards of VHD images on real files."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers_block import Machine, content, discard, read, write
from tests.vhd_images import image
from xenbackend.block.chain import Chain
from xenbackend.block.mapped import holes
from xenbackend.opener.local import LocalOpener

MIB = 1 << 20
BLOCK = 2 * MIB
FULL = dict.fromkeys(range(4096), b"f" * 512)


def open_image(machine: Machine, path: Path) -> Chain:
    """Open an image, or skip the test if its file system cannot make holes."""
    chain = machine.open(f"vhd:{path}")
    if not chain.geometry.can_discard:
        chain.close()
        pytest.skip("this file system makes no holes")
    return chain


def test_a_hole_is_zeros_and_gives_room_back(machine: Machine, tmp_path: Path) -> None:
    """Discarded ranges are zeros, whether there was a block or not, and free their space. Headers do not change."""
    path = tmp_path / "image"
    path.write_bytes(image(8 * MIB, {0: FULL, 2: FULL}))
    room, front = path.stat().st_blocks, path.read_bytes()[:2048]
    chain = open_image(machine, path)
    statuses = machine.do(chain, discard(512, 5 * MIB), write(6 * MIB, b"n" * 512))
    found = machine.everything(chain)
    chain.close()

    assert [0, 0] == statuses
    expected = bytearray(b"f" * 512 + bytes(5 * MIB) + b"f" * (MIB - 512) + bytes(2 * MIB))
    expected[6 * MIB : 6 * MIB + 512] = b"n" * 512
    assert expected == found
    assert front[:1536] == path.read_bytes()[:1536]
    assert front[1536:1548] == path.read_bytes()[1536:1548]  # the entries of blocks 0 to 2
    assert path.stat().st_blocks < room


def test_the_parents_sectors_stay(machine: Machine, tmp_path: Path) -> None:
    """If a block lacks sectors, a discard makes those that it has zeros, and the others still come from the parent."""
    names = [(b"MacX", b"file://./base")]
    (tmp_path / "base").write_bytes(image(4 * MIB, {0: FULL, 1: FULL}, uuid=b"p" * 16))
    own = {0: {1: b"c" * 512, 2: b"c" * 512, 9: b"c" * 512}}
    path = tmp_path / "image"
    path.write_bytes(image(4 * MIB, own, parent_uuid=b"p" * 16, names=names))
    chain = open_image(machine, path)
    assert [0, 0] == machine.do(chain, discard(0, 5 * 512), discard(2 * MIB, MIB))

    expected = bytearray(b"f" * (4 * MIB))
    expected[512 : 3 * 512], expected[9 * 512 : 10 * 512] = bytes(1024), b"c" * 512
    assert expected == machine.everything(chain)
    chain.close()


def test_a_discard_of_everything(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discard of any size works on a limited number of blocks at a time, ends, and includes the last sector."""
    monkeypatch.setattr(holes, "_AT_ONCE", 16)
    path = tmp_path / "image"
    path.write_bytes(image(1024 * MIB, {0: FULL, 511: FULL}))
    chain = open_image(machine, path)
    assert [0] == machine.do(chain, discard(0, 1024 * MIB))
    last = read(1024 * MIB - 512, 512)
    assert [0] == machine.do(chain, last)

    assert bytes(512) == content(last)
    chain.close()


def test_a_device_is_left_alone(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a block device, whose discards do not promise zeros, discard is not offered, and is refused."""
    look = LocalOpener.look
    monkeypatch.setattr(LocalOpener, "look", lambda self, path: replace(look(self, path), is_device=True))
    path = tmp_path / "image"
    path.write_bytes(image(8 * MIB, {0: FULL}))
    chain = machine.open(f"vhd:{path}", checked=False)

    assert not chain.geometry.can_discard
    assert [errno.EOPNOTSUPP] == machine.do(chain, discard(0, MIB))
    chain.close()
