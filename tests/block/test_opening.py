"""Opening layers: order, parents, retries, failures."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers_block import Coarse, Machine, image
from tests.qemu import qemu_img
from xenbackend.block.chain import open_chain, parse_chain
from xenbackend.block.driver import Env
from xenbackend.block.opening import EIO_RETRIES, MAX_PARENTS, Opening
from xenbackend.errors import DriverError


def family(tmp_path: Path, *names: str) -> list[Path]:
    """Write images each of which names the next one as its parent."""
    paths = [tmp_path / name for name in names]
    for path, parent in pairwise(paths):
        path.write_text(f"child:{parent}")
    paths[-1].write_text("")
    return paths


def refused(machine: Machine, text: str, *, read_only: bool = False) -> DriverError:
    """Return the error with which a chain is refused."""
    with pytest.raises(DriverError) as caught:
        machine.open(text, read_only=read_only)
    return caught.value


def test_a_layer_has_its_own_requests_back_while_others_are_opened(machine: Machine, events: list[str]) -> None:
    """A filter's own requests come back to it, before and after a filter above has read from it while being opened."""
    opening = Opening(machine.make_env, lambda _: None)
    upper, lower, source = parse_chain("busy:|busy:|ram:1M").layers
    layers = opening.source_and_parents(source, read_only=False, shareable=False)
    for spec in (lower, upper):
        layers.insert(0, opening.filter(spec, layers, read_only=False))
        for each in layers[:-1]:
            each.driver.ask()

    assert [1, 2] == [len(each.driver.back) for each in layers[:-1]]
    assert all(each.driver.back == each.driver.own for each in layers[:-1])
    opening.close()


def test_the_source_is_opened_first_then_its_parents_then_the_filters(
    machine: Machine, events: list[str], tmp_path: Path
) -> None:
    """The source is opened first, then its parents, then the filters. Each parent is opened read-only, and checked by
    the child that named it.
    """
    leaf, middle, base = family(tmp_path, "leaf", "middle", "base")
    chain = machine.open(f"clumsy:|child:{leaf}", checked=False)
    chain.close()

    assert events == [
        f"open {leaf} False False",
        f"open {middle} True False",
        "check 1048576 True",
        f"open {base} True False",
        "check 1048576 True",
        "open clumsy",
        "close clumsy",
        f"close {leaf}",
        f"close {middle}",
        f"close {base}",
    ]
    assert ["", "", f"child:{leaf}", f"child:{middle}"] == [layer.parent_of for layer in chain.layers]
    assert chain.layers[1].driver.next is chain.layers[2].driver


def test_a_failure_closes_what_was_opened_in_reverse_order(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """If a layer cannot be opened, everything that was opened is closed, in reverse order."""
    leaf, base = family(tmp_path, "leaf", "base")
    error = refused(machine, f"clumsy:at=open|clumsy:|child:{leaf}")

    assert events[-3:] == ["close clumsy", f"close {base}", f"close {leaf}"]
    assert str(error) == "clumsy:at=open: its driver failed unexpectedly: KeyError: 'x'"


def test_a_parent_that_is_refused_is_closed_again(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """If `check_parent` refuses the parent, the error names the child, and both are closed."""
    leaf, base = family(tmp_path, "leaf", "base")
    error = refused(machine, f"child:{leaf},refuse=yes")

    assert str(error) == f"child:{leaf},refuse=yes: does not like it"
    assert events[-2:] == [f"close {base}", f"close {leaf}"]


def test_a_loop_of_parents_is_found_through_links(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """A loop is found by device and inode: a parent that is a hard link to its child is refused before it is opened."""
    leaf, base = family(tmp_path, "leaf", "base")
    alias = tmp_path / "alias"
    os.link(leaf, alias)
    base.write_text(f"child:{alias}")
    error = refused(machine, f"child:{leaf}")

    assert "is the same file as the image or one of its children" in str(error)
    assert error.layer == f"child:{base}"
    assert [f"open {leaf} False False", f"open {base} True False"] == [
        each for each in events if each.startswith("open")
    ]


def test_a_loop_that_leaves_out_the_first_image_is_found(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """A parent that names itself, or one of its children, is refused at any level."""
    leaf, middle, base = family(tmp_path, "leaf", "middle", "base")
    for again in (middle, base):
        base.write_text(f"child:{again}")

        assert f"its parent child:{again} is the same file as the image or one of its children" in str(
            refused(machine, f"child:{leaf}")
        )


def test_files_are_told_apart_only_where_there_are_parents(
    machine: Machine, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image without a parent is not identified. Each parent is identified twice: before and after it is opened."""
    leaf, middle, base = family(tmp_path, "leaf", "middle", "base")
    asked: list[str] = []
    look = machine.files.look
    monkeypatch.setattr(machine.files, "look", lambda path: asked.append(path) or look(path))
    machine.open(f"child:{base}").close()
    assert [] == asked
    machine.open(f"child:{leaf}").close()

    assert [str(each) for each in (leaf, middle, middle, base, base)] == asked
    assert events


def test_parents_have_a_limit(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """MAX_PARENTS parents are opened. With one more the chain is refused, and nothing stays open."""
    paths = family(tmp_path, *(str(number) for number in range(MAX_PARENTS + 2)))
    machine.open(f"child:{paths[1]}").close()
    events.clear()
    error = refused(machine, f"child:{paths[0]}")

    assert "more than 32 parents" in str(error)
    assert sum(event.startswith("open") for event in events) == sum(event.startswith("close") for event in events)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("null:|null:", "cannot be opened"), ("delay:|null:", "is a chain and not an image"), ("zonk:", "unknown driver")],
)
def test_a_parent_is_one_source(machine: Machine, events: list[str], tmp_path: Path, text: str, problem: str) -> None:
    """A parent is one layer. An image cannot name a chain as its parent, because images are not trusted that much."""
    leaf = tmp_path / "leaf"
    leaf.write_text(text)

    assert problem in str(refused(machine, f"child:{leaf}"))


def test_a_filter_has_no_parent(machine: Machine, events: list[str]) -> None:
    """D10: a filter cannot have a parent, since it has a layer below it already."""
    assert "a filter cannot have a parent" in str(refused(machine, "clumsy:at=parent|null:"))


def test_only_eio_is_tried_again(machine: Machine, events: list[str]) -> None:
    """A layer that fails to open with EIO is tried again ten times, a second apart. Any other error is final."""
    machine.open("clumsy:at=eio,times=10|null:").close()

    assert [1.0] * EIO_RETRIES == machine.slept
    machine.slept.clear()
    assert str(refused(machine, "clumsy:at=oserror|null:")) == "clumsy:at=oserror: [Errno 6] no such thing"
    assert machine.slept == []


def test_eio_that_stays_is_reported_after_the_last_try(machine: Machine, events: list[str]) -> None:
    """If EIO is still there after ten more tries, it is reported, and the layers below are closed."""
    error = refused(machine, "clumsy:at=eio|clumsy:|null:")

    assert str(error) == "clumsy:at=eio: [Errno 5] not yet"
    assert [1.0] * EIO_RETRIES == machine.slept
    assert events[-1] == "close clumsy"


def test_faults_of_files_name_layer_option_and_file(machine: Machine, tmp_path: Path) -> None:
    """Each reason why a file cannot be a disk has a message of its own, which names the layer and the file."""
    missing, odd, empty = tmp_path / "missing", image(tmp_path / "odd", 1000), image(tmp_path / "empty", 0)

    error = refused(machine, f"aio:{missing}")
    assert str(error) == f"aio:{missing}: option file: there is no file or device {missing}"
    assert (f"aio:{missing}", "file", str(missing)) == (error.layer, error.option, error.path)
    assert refused(machine, f"aio:{tmp_path}").option == "file"
    assert "is a directory" in str(refused(machine, f"aio:{tmp_path}"))
    assert "not a multiple" in str(refused(machine, f"aio:{odd}"))
    assert "empty" in str(refused(machine, f"aio:{empty}"))
    assert "leads through something" in str(refused(machine, f"aio:{odd}/x"))
    assert "File name too long" in str(refused(machine, f"aio:{tmp_path}/{'x' * 300}"))
    assert "not a multiple of its sector" in str(refused(machine, "null:1000"))
    assert "a disk must have less than 8192 PiB" in str(refused(machine, "null:8192P"))
    assert "it is empty" in str(refused(machine, "null:0"))


@pytest.mark.usefixtures("events")
def test_physical_sectors_that_nothing_has(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that reports an impossible physical sector size is refused by name."""
    monkeypatch.setattr(Coarse, "open", lambda self, _env: replace(self.below, physical_sector_size=3000))

    assert "its physical sector of 3000 bytes is not a power of two" in str(refused(machine, "coarse:|null:1M"))


def test_a_locked_image_is_refused(machine: Machine, tmp_path: Path) -> None:
    """An image has only one writer. A second one is refused, with the layer's name, because the image is locked."""
    path = image(tmp_path / "img")
    chain = machine.open(f"aio:{path}")
    error = refused(machine, f"delay:|aio:{path}")
    chain.close()

    assert "is locked" in str(error)
    assert str(error).startswith(f"aio:{path}: option file: ")


def test_layers_of_the_same_text_have_names_of_their_own(machine: Machine) -> None:
    """Each layer's memory has a name that is unique in the chain and does not change when other layers are added."""
    names: list[str] = []

    def make_env(layer: str, *, read_only: bool, shareable: bool) -> Env:
        names.append(layer)
        return machine.make_env(layer, read_only=read_only, shareable=shareable)

    for text in ("delay:|ram:1M", "delay:|delay:|ram:1M"):
        open_chain(parse_chain(text), make_env, read_only=False).close()
    ram, delay = names[:2]

    assert [ram, delay, ram, delay, f"{delay}.2"] == names


def test_a_layer_may_be_shared_by_its_option(machine: Machine, tmp_path: Path) -> None:
    """share=on shares one layer, as w! shares a disk. Parents and other layers are not shared by it."""
    shared: dict[str, bool] = {}

    def make_env(layer: str, *, read_only: bool, shareable: bool) -> Env:
        shared[layer.partition("-")[0]] = shareable
        return machine.make_env(layer, read_only=read_only, shareable=shareable)

    base, child = tmp_path / "base", tmp_path / "child"
    base.write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", child)
    for text, expected in ((f"aio:{base}", False), (f"aio:{base},share=on", True)):
        open_chain(parse_chain(text), make_env, read_only=False).close()
        assert {"aio": expected} == shared
    open_chain(parse_chain(f"delay:|qcow2:{child},share=on"), make_env, read_only=False).close()
    assert {"aio": False, "qcow2": True, "delay": False} == shared


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without permission")
def test_a_file_without_permission_is_refused(machine: Machine, tmp_path: Path) -> None:
    """If permission is missing, the error says so."""
    path = image(tmp_path / "img")
    path.chmod(0o400)
    for directory in (tmp_path, *list(tmp_path.parents)[:2]):
        directory.chmod(0o755)

    os.seteuid(65534)
    try:
        error = refused(machine, f"aio:{path}")
    finally:
        os.seteuid(0)

    assert str(error) == f"aio:{path}: option file: no permission for {path}"


def test_a_file_that_its_server_knows_no_more_has_a_sentence(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an NFS server has lost a file, the error is a sentence with its errno, by which a disk in service waits."""
    path = image(tmp_path / "image")

    def opens(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(machine.files, "open", opens)
    problem = refused(machine, f"aio:{path}")

    assert errno.ESTALE == problem.errno
    assert f"{path} is not known to its server any more: it has been removed or replaced there" in str(problem)
