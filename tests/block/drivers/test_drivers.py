"""The table of drivers, and drivers of third parties."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from xenbackend.block import drivers
from xenbackend.block.driver import Driver
from xenbackend.block.options import FILE, describe_options

needs_third_party = pytest.mark.skipif(
    not metadata.entry_points(group=drivers.GROUP, name="xor"),
    reason="tests/third_party is not installed: pip install --no-deps --no-build-isolation ./tests/third_party",
)


@pytest.mark.parametrize("name", sorted(drivers.BUILT_IN))
def test_the_table_names_what_is_there(name: str) -> None:
    """Each name in the table leads to a driver of that name."""
    found = drivers.find_driver(name)

    assert issubclass(found, Driver)
    assert name == found.name


def test_no_word_is_both_built_and_unbuilt_to_the_operator() -> None:
    """No name is listed both as built and as not built."""
    assert set() == set(drivers.BUILT_IN) & set(drivers.UNBUILT)


def test_what_opens_no_image_is_known_without_loading_it() -> None:
    """Of a chain's words alone it is known whether one of its drivers may open an image; it may if it is not known."""
    without = {
        name
        for name in drivers.BUILT_IN
        if FILE.noun not in {each.kind for each in describe_options(drivers.find_driver(name).Options)}
    }

    assert without | {"log"} == drivers.WITHOUT_IMAGES, "a record is a file, and no image"
    for words in ([], ["aio"], ["log", "vhdsync"], ["nbd", "xor"]):
        assert drivers.may_open_images(words)
    for words in (["nbd"], ["valve", "rbd"]):
        assert not drivers.may_open_images(words)


def test_words_of_blktap_lead_to_a_driver_or_to_what_takes_their_place() -> None:
    """Every driver name of blktap is another name of a driver here, or its error says what to use instead."""
    for name in ("bc", "lc", "llp", "qed", "remus", "valve", "vhdi", "vhdsync"):
        if name in drivers.ALIASES:
            assert drivers.ALIASES[name] == drivers.find_driver(name).name
            continue
        with pytest.raises(LookupError, match=r"is known but not built in this version; .{30}"):
            drivers.find_driver(name)


@needs_third_party
def test_a_third_partys_driver_is_a_word_like_any_other() -> None:
    """A third party's driver is found by its entry point, and is listed."""
    assert drivers.find_driver("xor").name == "xor"
    assert "xor" in drivers.driver_names()


@needs_third_party
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("xor-broken", "of xenbackend-xor cannot be loaded: ModuleNotFoundError: No module named 'a_package"),
        ("xor-future", "was written for version 3 of the driver contract and this is version 2"),
        ("xor-stranger", "is not a subclass of Driver"),
        ("xro", "unknown driver 'xro'; did you mean xor?"),
    ],
)
def test_a_driver_that_cannot_be_used_says_why(name: str, sentence: str) -> None:
    """If a third party's driver cannot be imported, or is for another contract version, its package is named."""
    with pytest.raises(LookupError) as caught:
        drivers.find_driver(name)

    assert sentence in str(caught.value)


@pytest.mark.slow
def test_a_built_in_driver_is_found_without_looking_at_packages() -> None:
    """A worker whose drivers are all built in reads no package metadata and loads no other driver."""
    program = """
import sys
from importlib import metadata
metadata.entry_points = None
from xenbackend.block.spec import parse_chain
parse_chain("delay:|null:1G")
print(*sorted(name for name in sys.modules if name.startswith("xenbackend.block.drivers.")))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert output.split() == ["xenbackend.block.drivers.delay", "xenbackend.block.drivers.null"]
