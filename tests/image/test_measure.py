"""The predicted size of a new image, compared with the real one and with qemu-img's prediction."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.image_content import ignore
from tests.qemu import qemu_img
from xenbackend.block.formats.blank import Wishes
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ConfigError
from xenbackend.image.convert import convert
from xenbackend.image.measure import Measured, measure
from xenbackend.image.names import image_of_file

MIB = 1 << 20


def from_qemu(*arguments: str | Path) -> Measured:
    """Return qemu-img's prediction for a QCOW2 image."""
    found = json.loads(qemu_img("measure", "--output=json", "-O", "qcow2", *arguments))
    return Measured(found["required"], found["fully-allocated"])


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [
        (size, cluster)
        for size in (512, MIB, 5 * MIB + 512, 1 << 30, 100 << 30, 3 << 40)
        for cluster in (512, 4096, 65536, 2 << 20)
        if size // cluster // cluster * 64 <= 32 * MIB  # bytes of the L1 table
    ],
)
def test_an_empty_qcow2_is_qemus(size: int, cluster_size: int) -> None:
    """For any disk and cluster size, both figures are QEMU's."""
    found = measure("qcow2", size, Wishes(cluster_size))

    assert from_qemu("--size", str(size), "-o", f"cluster_size={cluster_size}") == found


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_a_qcow2_of_data_is_qemus(raw: Path, cluster_size: int) -> None:
    """With data, both figures are QEMU's: clusters with data count, each once."""
    found = measure("qcow2", parse_chain(f"aio:{raw}"), Wishes(cluster_size))

    assert from_qemu("-f", "raw", "-o", f"cluster_size={cluster_size}", raw) == found


@pytest.mark.parametrize(
    ("image_format", "wishes"),
    [
        ("raw", Wishes()),
        ("vhd", Wishes()),
        ("vhd", Wishes(512 << 10)),
        ("vhd", Wishes(is_fixed=True)),
        ("qcow2", Wishes()),
        ("qcow2", Wishes(512)),
        ("qcow", Wishes()),
        ("qcow", Wishes(512)),
    ],
)
@pytest.mark.parametrize("is_full", [False, True])
def test_what_is_made_is_no_larger(tmp_path: Path, image_format: str, wishes: Wishes, is_full: bool) -> None:
    """The new image is no larger than predicted, and not much smaller."""
    chance, source = Random(3), tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(8 * MIB)
        for place in range(0, 8 * MIB, MIB if is_full else 3 * MIB):
            file.seek(place)
            file.write(chance.randbytes(MIB if is_full else 70000))
    chain = parse_chain(f"aio:{source}")
    found = measure(image_format, chain, wishes)
    convert(chain, image_of_file(image_format, f"{tmp_path}/new"), wishes, ignore)
    size = (tmp_path / "new").stat().st_size
    if image_format == "qcow2":  # the file may end in a hole, where it was extended in advance
        size = json.loads(qemu_img("check", "--output=json", tmp_path / "new"))["image-end-offset"]

    assert size <= found.required <= found.fully_allocated
    assert found.required < 1.1 * size + MIB


def test_what_cannot_be_made_is_not_measured() -> None:
    """For an image that cannot be made, the error is that of `create`."""
    with pytest.raises(ConfigError, match="holds up to 2040 GiB"):
        measure("vhd", 3 << 40, Wishes())
