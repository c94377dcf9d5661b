"""vhdx: what it reports, and sectors of 4 KiB; reading is in test_vdi.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.foreign_images import MIB, vhdx
from tests.helpers_block import Machine, content, read
from xenbackend.errors import DriverError


def test_large_sectors(machine: Machine, tmp_path: Path) -> None:
    """A disk with sectors of 4 KiB says so, and is read in them."""
    (tmp_path / "a").write_bytes(vhdx(4 * MIB, {3: b"d" * MIB}, sector_size=4096))
    chain = machine.open(f"vhdx:{tmp_path}/a", read_only=True)
    request = read(3 * MIB - 4096, 8192)
    assert [0] == machine.do(chain, request)
    chain.close()

    assert (4 * MIB, 4096) == (chain.geometry.size, chain.geometry.sector_size)
    assert bytes(4096) + b"d" * 4096 == content(request)


def test_a_log_that_was_not_replayed(machine: Machine, tmp_path: Path) -> None:
    """An image with changes in its log is refused, with the way out."""
    (tmp_path / "a").write_bytes(vhdx(4 * MIB, {}, log=b"l" * 16))
    with pytest.raises(DriverError, match="run qemu-img check -r all"):
        machine.open(f"vhdx:{tmp_path}/a", read_only=True)
