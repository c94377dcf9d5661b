"""New leaves for chains in service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, flush, write
from tests.openers import Openers
from tests.qcow_images import qcow, qcow2
from tests.vhd_images import image
from xenbackend.block.chain import Chain
from xenbackend.errors import ConfigError, DriverError
from xenbackend.opener import marks
from xenbackend.protocol import jobs
from xenbackend.worker.leaf import make_leaf

SIZE = 4 << 20
BLANK = {"vhd": image, "qcow2": qcow2, "qcow": qcow, "aio": bytes}


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    machine.files.lock_timeout_s = (
        2.0  # the kernel closes a file that has I/O in flight a moment after its process has ended
    )
    yield machine
    machine.close()


@pytest.fixture
def openers() -> Iterator[Openers]:
    """Return openers for workers in this process."""
    openers = Openers()
    yield openers
    openers.close()


def make(openers: Openers, machine: Machine, chain: Chain, path: str, image_format: str = "") -> str:
    """Make a leaf through an opener; meanwhile this process opens nothing else."""
    text = "|".join(each.text for each in chain.layers if not each.parent_of)
    opener = openers.remote(jobs.Job("vbd/5/51712", [text], read_only=False, makes=path))
    former, machine.files.opener = machine.files.opener, opener
    try:
        return make_leaf(chain, opener, path, image_format)
    finally:
        machine.files.opener = former
        opener.close()
        openers.close()


@pytest.mark.parametrize("driver", BLANK)
def test_a_guest_goes_on_on_a_new_leaf(machine: Machine, openers: Openers, tmp_path: Path, driver: str) -> None:
    """A leaf that is made while the guest writes has, once it is opened, all writes from before and after."""
    (tmp_path / "base").write_bytes(BLANK[driver](SIZE))
    chain, model, chance = machine.open(f"log:|{driver}:{tmp_path}/base"), bytearray(SIZE), Random(1)

    def writes(count: int) -> None:
        for _ in range(count):
            place, data = chance.randrange(0, SIZE - 4096) // 512 * 512, chance.randbytes(4096)
            model[place : place + 4096] = data
            assert [0] == machine.do(chain, write(place, data))

    for generation in range(3):
        writes(20)
        text = make(openers, machine, chain, f"{tmp_path}/leaf{generation}")
        writes(20)
        assert [0] == machine.do(chain, flush())
        chain.close()
        old = (tmp_path / "base").read_bytes()
        chain = machine.open(text)
        assert model == machine.everything(chain)

    writes(20)
    assert model == machine.everything(chain)
    assert "log" == chain.layers[0].driver.name
    assert old == (tmp_path / "base").read_bytes()
    assert 5 == len(chain.layers)
    assert all(each.geometry.read_only for each in chain.layers[2:])
    chain.close()


def test_nothing_is_written_over(machine: Machine, openers: Openers, tmp_path: Path) -> None:
    """If the name is taken, or no such leaf is possible, nothing is made, and the chain stays as it was."""
    (tmp_path / "base").write_bytes(qcow2(SIZE))
    (tmp_path / "taken").write_bytes(b"mine")
    chain = machine.open(f"qcow2:{tmp_path}/base")
    for name, image_format, sentence in (("taken", "", "exists already"), ("new", "vhd", "not qcow2")):
        with pytest.raises(ConfigError, match=sentence):
            make(openers, machine, chain, f"{tmp_path}/{name}", image_format)

    assert {"base", "taken"} == {path.name for path in tmp_path.iterdir()}
    assert b"mine" == (tmp_path / "taken").read_bytes()
    assert [0] == machine.do(chain, write(0, b"x" * 512))
    chain.close()


def test_only_its_owner_may_read_a_leaf(machine: Machine, openers: Openers, tmp_path: Path) -> None:
    """A new leaf, which will be the guest's disk, is readable by its owner only."""
    (tmp_path / "base").write_bytes(qcow2(SIZE))
    chain = machine.open(f"qcow2:{tmp_path}/base")
    make(openers, machine, chain, f"{tmp_path}/new")
    chain.close()

    assert 0o600 == (tmp_path / "new").stat().st_mode & 0o777


@pytest.mark.parametrize("driver", BLANK)
def test_a_leaf_is_opened_with_its_parent_and_no_other(openers: Openers, tmp_path: Path, driver: str) -> None:
    """A leaf in another directory is marked with its parent, and refuses another file with the parent's name."""
    (tmp_path / "far").mkdir()
    (tmp_path / "base").write_bytes(BLANK[driver](SIZE))
    machine = Machine(parents=())
    chain = machine.open(f"{driver}:{tmp_path}/base")
    text = make(openers, machine, chain, f"{tmp_path}/far/leaf")
    chain.close()
    assert "parents=" not in text
    chain = machine.open(text)
    assert "its mark" == chain.layers[0].driver.env.facts["parent_by"]
    chain.close()
    (tmp_path / "base").rename(tmp_path / "former")
    (tmp_path / "base").write_bytes(BLANK[driver](SIZE))
    with pytest.raises(DriverError, match="base is not the one that the image was marked for"):
        machine.open(text)
    machine.close()


def test_a_leaf_that_cannot_be_marked_says_where_its_parent_is(
    openers: Openers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file system keeps no marks, the new chain's text names the parent's directory."""
    monkeypatch.setattr(marks, "PARENT", "nonsense.xenbackend.parent")
    (tmp_path / "base").write_bytes(qcow2(SIZE))
    machine = Machine(parents=())
    chain = machine.open(f"qcow2:{tmp_path}/base")
    text = make(openers, machine, chain, f"{tmp_path}/leaf")
    chain.close()

    assert f"qcow2:{tmp_path}/leaf,parents={tmp_path}" == text
    machine.open(text).close()
    machine.close()
