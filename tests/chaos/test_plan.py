"""The disks of a chaos run have each filter in their chains, and administrators order what goes with a disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.chaos.plan import Disk, content, disks, has_unnamed, holds, next_wishes
from xenbackend.block.cache_parts import MODES
from xenbackend.block.drivers import BUILT_IN, find_driver
from xenbackend.block.drivers.cache import Cache
from xenbackend.block.drivers.cow import Cow
from xenbackend.block.drivers.throttle import Throttle
from xenbackend.block.files import UNNAMED
from xenbackend.block.spec import parse_chain

NAMES = ("deep", "summed", "logged", "full", "bad", "vhd", "qcow2", "own")
IMAGE = Path("/images/new.img")


@pytest.fixture(name="disk", params=NAMES)
def one_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """Return each disk in turn."""
    return made(tmp_path)[NAMES.index(request.param)]


def made(directory: Path) -> list[Disk]:
    """Return all disks, without their images."""
    return disks(directory, directory, lambda _kind, _file: None)


def orders(disk: Disk, chain: str, verb: str) -> list[dict[str, Any]]:
    """Return the requests of one verb among many rounds of orders about a disk with this chain."""
    random = Random(1)
    rounds = (next_wishes(random, disk, chain, IMAGE, may_grow=True) for _ in range(600))
    return [wish.request for each in rounds for [wish] in each if wish.verb == verb]


def test_each_filter_has_its_share_of_the_kills(tmp_path: Path) -> None:
    """Each filter is in a chain, a cache in each mode, `cow:` with a file and without; two disks share one group.

    `partition:` is missing: it computes where `offset:` is told.
    """
    layers = [each for disk in made(tmp_path) for each in parse_chain(disk.other).layers]
    filters = {name for name in BUILT_IN if find_driver(name).is_filter}
    options = [each.options for each in layers]

    assert filters - {"partition"} <= {each.driver.name for each in layers}
    assert {*MODES} == {each.mode for each in options if isinstance(each, Cache.Options)}
    assert {True, False} == {each.file == UNNAMED for each in options if isinstance(each, Cow.Options)}
    assert [2] == [*Counter(each.group for each in options if isinstance(each, Throttle.Options)).values()]


def test_set_leaves_what_holds_data_and_varies_the_rest(disk: Disk) -> None:
    """No `set` takes out a filter with data of the guest or the way to them; each other filter comes and goes."""
    wanted = [each for each in disk.chain.split("|") if holds(each)]
    chains = [request["chain"].split("|") for request in orders(disk, disk.chain, "set")]

    assert {*map(_word, wanted)} == {_word(each) for chain in chains for each in chain if holds(each)}
    assert {len(wanted)} == {len([each for each in chain if holds(each)]) for chain in chains}
    for each in [each for each in disk.other.split("|")[:-1] if not holds(each)]:
        assert {True, False} == {each in chain for chain in chains}


def test_set_names_the_file_that_was_unnamed(tmp_path: Path) -> None:
    """Once an unnamed file has got a name, each `set` has that, and nobody orders to keep or drop it any more."""
    disk = made(tmp_path)[NAMES.index("full")]
    chain = disk.chain.replace("cow:", "cow:/images/kept")

    assert has_unnamed(disk.chain)
    assert not has_unnamed(chain)
    assert {True} == {"cow:/images/kept" in request["chain"] for request in orders(disk, chain, "set")}
    assert {"file": str(IMAGE)} in orders(disk, disk.chain, "keep")
    assert [] == orders(disk, chain, "keep") + orders(disk, chain, "drop")


def test_snapshots_are_for_images_that_are_written_to(disk: Disk) -> None:
    """A snapshot is seldom ordered below a filter that keeps writes or sums: it is refused there."""
    is_refused = any(each.startswith(("cow:", "checksum:")) or "writeback" in each for each in disk.chain.split("|"))

    assert is_refused == (len(orders(disk, disk.chain, "snapshot")) < len(orders(disk, disk.chain, "resize")))


def test_what_is_compared_in_the_end_has_every_layer_with_content(disk: Disk) -> None:
    """Only filters that break or delay requests are left out when a chain is compared with what its guest read."""
    left_out = {"fault", "delay", "throttle", "log"}
    layers = parse_chain(disk.other).layers

    assert "|".join(each.text for each in layers if each.driver.name not in left_out) == content(disk.other)


def _word(layer: str) -> str:
    return layer.partition(",destage=")[0]
