"""The driver partition."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers_block import Machine, content, read, write
from tests.partition_tables import gpt, mbr
from tests.qemu import qemu_img
from xenbackend.errors import ChainError, DriverError

SIZE = 4 << 20


@pytest.mark.parametrize(
    "way",
    [
        "aio:{raw}", "sync:{raw}", "aio:{raw},cache=on", "qcow2:{qcow2}", "delay:read=1ms|aio:{raw}",
        "log:|offset:start=0|vhd:{vhd}",
    ],
)  # fmt: skip
def test_a_table_is_found_through_any_layer(machine: Machine, tmp_path: Path, way: str) -> None:
    """The table is read through the layers below, whatever they are, when the chain is opened."""
    disk = gpt(SIZE, {2: (2048, 4095)})
    disk[1 << 20 : (1 << 20) + 512] = b"here" * 128
    raw = tmp_path / "raw"
    raw.write_bytes(disk)
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "qcow2")
    qemu_img("convert", "-O", "vpc", "-o", "force_size=on", raw, tmp_path / "vhd")
    chain = machine.open(f"partition:2|{way.format(raw=raw, qcow2=tmp_path / 'qcow2', vhd=tmp_path / 'vhd')}")
    first = read(0, 512)

    assert [0] == machine.do(chain, first)
    assert (1 << 20, b"here" * 128) == (chain.geometry.size, content(first))
    assert chain.layers[0].driver.env.facts["partition"] == (
        "GPT, type 0fc63daf-8483-4772-8e79-3d69d8477de4, from 1 MiB"
    )
    chain.close()


def test_the_table_cannot_be_reached(machine: Machine, tmp_path: Path) -> None:
    """A guest that overwrites its whole disk changes neither the table nor other partitions."""
    path = tmp_path / "img"
    before = mbr(SIZE, {1: (0x83, 2048, 100), 2: (0x83, 2148, 50)})
    path.write_bytes(before)
    chain = machine.open(f"partition:1|aio:{path}")
    assert [0] == machine.do(chain, write(0, b"\xff" * 51200))
    chain.close()
    before[1 << 20 : (1 << 20) + 51200] = b"\xff" * 51200

    assert before == path.read_bytes()


def test_a_table_that_cannot_be_used_is_refused(machine: Machine, tmp_path: Path) -> None:
    """No table, no such partition, a bad number, an unreadable table: the error says so, and nothing stays open."""
    path = tmp_path / "img"
    path.write_bytes(mbr(SIZE, {1: (0x83, 2048, 100)}))

    with pytest.raises(DriverError, match="partition:2: there is no partition 2; the MBR has 1"):
        machine.open(f"partition:2|aio:{path}")
    with pytest.raises(DriverError, match="there is no partition table"):
        machine.open("partition:1|ram:1M")
    with pytest.raises(ChainError, match="partitions are numbered from 1"):
        machine.open("partition:0|ram:1M")
    with pytest.raises(DriverError, match="No space left"):
        machine.open(f"partition:1|fault:errno=ENOSPC|aio:{path}")
    machine.open(f"aio:{path}").close()


def test_a_damaged_header_is_told(machine: Machine, tmp_path: Path) -> None:
    """If a damaged table is used nevertheless, the layer has a fact that says what is wrong."""
    disk = gpt(SIZE, {1: (2048, 4095)})
    disk[600] ^= 1
    path = tmp_path / "img"
    path.write_bytes(disk)
    chain = machine.open(f"partition:1|aio:{path}", read_only=True)
    assert "the first header has a wrong checksum" in chain.layers[0].driver.env.facts["trouble"]
    chain.close()
