"""What a new image over an open one is; image/test_create.py makes one of every format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers_block import Machine
from tests.loops import loop
from tests.qcow_images import qcow, qcow2
from tests.vhd_images import image
from xenbackend.block.leaf import leaf_over
from xenbackend.errors import ConfigError

SIZE = 1 << 20


@pytest.mark.parametrize(
    ("layer", "leaf"),
    [
        ("qcow2:{base},cache=on", "qcow2:{new},cache=on"),
        ("qcow:{base}", "qcow:{new},parent_format=qcow"),
        ("vhd:{base},changed=accept", "vhd:{new},changed=accept"),
        ("aio:{base},cache=on", "qcow2:{new},cache=on"),
        ("sync:{base}", "qcow2:{new}"),
    ],
)
def test_a_leaf_goes_on_as_its_parent(machine: Machine, tmp_path: Path, layer: str, leaf: str) -> None:
    """By default a leaf has its parent's format (QCOW2 over raw), its size, and the options of its layer."""
    names = {"base": tmp_path / "base", "new": tmp_path / "new"}
    maker = {"qcow2": qcow2, "qcow": qcow, "vhd": image}.get(layer.partition(":")[0], bytes)
    names["base"].write_bytes(maker(SIZE))
    chain = machine.open(layer.format(**names))
    found = leaf_over(chain.layers, str(names["new"]))
    chain.close()

    assert (leaf.format(**names), SIZE) == (found.text, found.size)


def test_what_can_have_no_leaf(machine: Machine, tmp_path: Path) -> None:
    """A disk that is not an image has no leaf, nor has one whose format cannot be a parent for the format asked for."""
    (tmp_path / "base").write_bytes(qcow2(SIZE))
    for layer, image_format, sentence in (
        ("ram:1M", "", "^ram:1M is not an image that another one can have as its parent$"),
        ("ram:1M", "qcow2", "^ram:1M is not an image that another one can have as its parent$"),
        (f"qcow2:{tmp_path}/base", "vdi", "^an image of the format 'vdi' can have no parent; choose another format$"),
        (f"qcow2:{tmp_path}/base", "tar", "^an image of the format 'tar' can have no parent; choose another format$"),
        (f"qcow2:{tmp_path}/base", "vhd", "parent of a vhd image can be vhd or raw, not qcow2"),
    ):
        chain = machine.open(layer)
        with pytest.raises(ConfigError, match=sentence):
            leaf_over(chain.layers, f"{tmp_path}/new", image_format)
        chain.close()


def test_what_a_leaf_says_that_cannot_be_marked(machine: Machine, tmp_path: Path) -> None:
    """If a leaf cannot be marked, its layer has to say `parents=` with the parent's directory, added to those that the
    parent's layer allows.
    """
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "base").write_bytes(qcow2(SIZE))
    new = f"{tmp_path}/new"
    for options, places in (
        ("", f"{tmp_path}/a"),
        (f",parents={tmp_path}/a", f"{tmp_path}/a"),
        (",parents=/x:/y", f"/x:/y:{tmp_path}/a"),
    ):
        chain = machine.open(f"qcow2:{tmp_path}/a/base{options}", read_only=True)
        leaf = leaf_over(chain.layers, new)
        chain.close()
        assert (f"qcow2:{new}{options}", f"qcow2:{new},parents={places}") == (leaf.text, leaf.unmarked)


def test_a_leaf_over_a_device(machine: Machine, tmp_path: Path) -> None:
    """A device is named by the name that the administrator uses; its symbolic links are not resolved."""
    with loop(tmp_path / "disk", SIZE, sector_size=512) as (device, _):
        (tmp_path / "name").symlink_to(device)
        chain = machine.open(f"aio:{tmp_path}/name", read_only=True)
        leaf = leaf_over(chain.layers, f"{tmp_path}/new")
        chain.close()

    assert f"qcow2:{tmp_path}/new,parents={tmp_path}/name" == leaf.unmarked
    assert any(os.fsencode(tmp_path / "name") in data for _, data in leaf.blank.pieces)
