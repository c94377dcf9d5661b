"""Which chain may replace another one below a running guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers_block import Machine
from tests.qcow_images import qcow2
from xenbackend.block.leaf import leaf_over
from xenbackend.block.successor import keeps_content, shows_the_same
from xenbackend.opener.newfile import write_new

SIZE = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with two raw images, other names of the first one, and a snapshot over it."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "hard").hardlink_to(tmp_path / "one")
    (tmp_path / "other.qcow2").write_bytes(qcow2(SIZE))
    return tmp_path


@pytest.mark.parametrize(
    ("former", "new", "keeps"),
    [
        ("aio:{d}/one", "log:|aio:{d}/one", True),
        ("log:|aio:{d}/one", "sync:{d}/one", True),
        ("aio:{d}/one", "aio:{d}/link", True),
        ("aio:{d}/one", "aio:{d}/hard", True),
        ("aio:{d}/one", "aio:{d}/two", False),
        ("aio:{d}/one", "ram:1M", False),
        ("aio:{d}/one", "qcow2:{d}/other.qcow2", False),
        ("aio:{d}/other.qcow2", "qcow2:{d}/other.qcow2", False),
        ("ram:1M", "delay:read=1ms|ram:1M", True),
        ("ram:1M", "null:1M", False),
        ("null:1M", "null:1M", True),
    ],
)
def test_the_same_content_is_known_by_its_file(
    machine: Machine, files: Path, former: str, new: str, *, keeps: bool
) -> None:
    """Chains have the same content if their source is the same file, under any name and with any filters."""
    chains = [machine.open(text.format(d=files), read_only=True) for text in (former, new)]
    found = keeps_content(*(chain.layers for chain in chains))
    for chain in chains:
        chain.close()

    assert keeps == found


@pytest.mark.parametrize(
    ("former", "new", "same"),
    [
        ("aio:{d}/one", "log:|delay:|aio:{d}/one", True),
        ("log:|offset:start=4K|aio:{d}/one", "offset:start=4K|aio:{d}/one", True),
        ("offset:start=4K|aio:{d}/one", "aio:{d}/one", False),
        ("offset:start=4K|aio:{d}/one", "offset:start=8K|aio:{d}/one", False),
        ("aio:{d}/one", "offset:start=4K|aio:{d}/one", False),
    ],
)
def test_filters_that_alter_what_is_read_have_to_stay(
    machine: Machine, files: Path, former: str, new: str, *, same: bool
) -> None:
    """Filters that alter what is read must stay: another part of an image is another disk from the same source."""
    chains = [machine.open(text.format(d=files), read_only=True) for text in (former, new)]
    layers = [chain.layers for chain in chains]
    found, source = shows_the_same(*layers), keeps_content(*layers)
    for chain in chains:
        chain.close()

    assert (same, True) == (found, source)


def test_a_name_that_means_another_file_now(machine: Machine, files: Path) -> None:
    """If a name means another file now, the content is another one, even if the chain's text is the same."""
    chain = machine.open(f"aio:{files}/one", read_only=True)
    (files / "two").rename(files / "new")
    successor = machine.open(f"aio:{files}/new", read_only=True)

    assert not keeps_content(chain.layers, successor.layers)
    chain.close()
    successor.close()


def test_a_snapshot_has_the_content_and_what_it_was_taken_of_has_lost_it(machine: Machine, files: Path) -> None:
    """A new leaf over the guest's image keeps its content. Going back from the leaf to its parent does not."""
    base = machine.open(f"aio:{files}/one", read_only=True)
    leaf = leaf_over(base.layers, f"{files}/leaf")
    write_new(f"{files}/leaf", leaf.blank)
    child = machine.open(leaf.text, read_only=True)

    assert keeps_content(base.layers, child.layers)
    assert not keeps_content(child.layers, base.layers)
    child.close()
    base.close()
