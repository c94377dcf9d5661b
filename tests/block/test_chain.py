"""Open chains: wiring, geometry, verbs, blame for exceptions, closing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers_block import Bottom, Machine, again, content, flush, image, read, write
from xenbackend.block.chain import Chain, OpenLayer
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Request
from xenbackend.errors import DriverError


def test_a_filter_that_passes_everything_on_is_not_on_the_way(
    machine: Machine, events: list[str], tmp_path: Path
) -> None:
    """With four empty filters, requests and completions still go directly between the engine and the file."""
    path = image(tmp_path / "img")
    chain = machine.open(f"silent:|silent:|silent:|silent:|aio:{path}", checked=False)
    file = chain.layers[-1].driver._file
    done: list[list[Request]] = []
    chain.complete = done.append

    assert chain.submit == file.submit
    assert file.complete == done.append
    chain.close()


def test_an_empty_filter_between_two_others_is_skipped(machine: Machine, events: list[str]) -> None:
    """The layer above an empty filter calls the layer below it, and completions skip it too."""
    chain = machine.open("clumsy:|silent:|delay:|ram:1M", checked=False)
    clumsy, silent, delay, ram = (layer.driver for layer in chain.layers)

    assert [0] == machine.do(chain, write(0, b"x" * 512))
    assert silent.submit == delay.submit
    assert ram.complete == clumsy.on_complete
    chain.close()


def test_an_exception_on_the_way_up_is_handed_over_with_its_batch(machine: Machine) -> None:
    """D8: an exception that a layer raises while requests come back is passed to `contain`, with the layer's batch."""
    chain = machine.open("delay:|ram:1M", checked=False)
    caught: list[tuple[str, list[Request]]] = []

    def broken(_batch: list[Request]) -> None:
        raise ValueError("broken")

    chain.layers[0].driver.on_complete = broken
    chain.contain = lambda bug, given: caught.append((str(bug), given))
    chain.complete = list[list[Request]]().append
    request = flush()
    chain.layers[1].driver.submit([request])
    chain.close()

    assert [("broken", [request])] == caught


@pytest.mark.parametrize("checked", [False, True])
def test_a_layer_has_its_own_requests_back_before_anybody_is_served(
    machine: Machine, events: list[str], *, checked: bool
) -> None:
    """A layer's own requests come back to it before a frontend connects, so a cache can already write below."""
    chain = machine.open("busy:|silent:|ram:1M", checked=checked)
    busy = chain.layers[0].driver
    busy.ask()
    before = len(busy.back)
    statuses = machine.do(chain, flush())
    busy.ask()
    chain.close()

    assert (1, [0]) == (before, statuses)
    assert busy.back == busy.own


def test_completions_can_be_taken_elsewhere_between_batches(machine: Machine) -> None:
    """Setting `complete` again reaches every layer, the file included."""
    chain = machine.open("delay:|ram:1M", checked=False)
    request, first, second = flush(), [], []
    chain.complete = first.append
    chain.submit([request])
    chain.complete = second.append
    chain.submit([again(request)])
    chain.close()

    assert [[request]] == first
    assert [[request]] == second


def test_geometry_is_that_of_the_top(machine: Machine, tmp_path: Path) -> None:
    """The chain has the size of the layers below its top."""
    path = image(tmp_path / "img")
    chain = machine.open(f"delay:|aio:{path}", read_only=True)
    geometry = chain.geometry
    chain.close()

    assert (1 << 20, True, False) == (geometry.size, geometry.read_only, geometry.can_discard)


def test_a_disk_that_is_only_read_offers_nothing_that_alters() -> None:
    """A chain that is opened read-only says so and offers no discard, even if its top layer does not care."""
    layer = OpenLayer("bottom:", Bottom(), Geometry(1024, can_discard=True, discard_granularity=512))

    assert Geometry(1024, read_only=True) == Chain([layer], read_only=True).geometry
    assert layer.geometry == Chain([layer], read_only=False).geometry


def test_a_layer_reports_what_it_chose(machine: Machine, tmp_path: Path) -> None:
    """What a driver reports is listed with its layer."""
    chain = machine.open(f"delay:|aio:{image(tmp_path / 'img')},cache=on")
    facts = [layer.driver.env.facts for layer in chain.layers]
    chain.close()

    assert {} == facts[0]
    assert facts[1]["mode"].startswith("page cache")


def test_a_verb_reaches_the_layer_that_is_named(machine: Machine) -> None:
    """A verb is addressed to a layer by the name of its driver, or by its number if several layers have that driver."""
    chain = machine.open("fault:op=read|fault:op=flush|delay:|ram:1M")
    machine.do(chain, flush())

    assert chain.control("0", "count", []) == b"0"
    assert chain.control("1", "count", []) == b"1"
    with pytest.raises(DriverError, match="several layers 'fault'; choose one by its number: 0 is fault:op=read, 1 is"):
        chain.control("fault", "count", [])
    with pytest.raises(DriverError, match="no layer 'log'; its layers are: 0 is fault:op=read, "):
        chain.control("log", "get", [])
    with pytest.raises(DriverError, match="no layer '4'"):
        chain.control("4", "get", [])
    with pytest.raises(DriverError, match="ram: does not know the verb 'get'"):
        chain.control("ram", "get", [])
    chain.close()


@pytest.mark.parametrize("place", ["submit", "complete"])
def test_an_exception_is_blamed_on_its_layer(machine: Machine, events: list[str], place: str) -> None:
    """D8: the layer that raised an exception is found, whether requests were on their way down or up."""
    chain = machine.open(f"silent:|clumsy:|clumsy:at={place}|delay:|ram:1M", checked=False)
    with pytest.raises(KeyError) as caught:
        machine.do(chain, flush())
    chain.close()

    assert chain.blame(caught.value) == f"clumsy:at={place}"


def test_a_file_is_blamed_as_its_layer(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """An exception raised in a file is blamed on the layer that opened it, although requests do not pass its driver."""
    text = f"sync:{image(tmp_path / 'img')}"
    chain = machine.open(f"silent:|{text}", checked=False)
    broken = flush()
    broken.op = 9
    with pytest.raises(IndexError) as caught:
        machine.do(chain, broken)
    chain.close()

    assert text == chain.blame(caught.value)
    assert chain.blame(ValueError()) == ""


def test_every_layer_is_closed_though_one_fails(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """If one layer fails to close, the layers below it are closed all the same, and its error is reported."""
    leaf = tmp_path / "leaf"
    leaf.write_text("")
    chain = machine.open(f"clumsy:at=close|child:{leaf}")
    with pytest.raises(OSError, match="close"):
        chain.close()

    assert ["close clumsy", f"close {leaf}"] == events[-2:]


def test_a_disk_that_can_only_be_read_is_no_writable_one(
    machine: Machine, events: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A chain whose top is read-only is refused for a writable vbd, and opened for a read-only one."""
    leaf, base = tmp_path / "leaf", tmp_path / "base"
    leaf.write_text(f"child:{base}")
    base.write_text("")
    monkeypatch.setattr("tests.helpers_block.Child.always_read_only", True)

    with pytest.raises(DriverError, match="it can only be read; attach the disk read-only"):
        machine.open(f"clumsy:|child:{leaf}")
    assert events[-3:] == ["close clumsy", f"close {base}", f"close {leaf}"]
    machine.open(f"clumsy:|child:{leaf}", read_only=True).close()


def test_a_parent_answers_what_the_child_passes_on(machine: Machine, events: list[str], tmp_path: Path) -> None:
    """A source with a parent passes requests to it as a filter does, and completions come back through the source."""
    leaf = tmp_path / "leaf"
    leaf.write_text("ram:1M")
    chain = machine.open(f"child:{leaf}", read_only=True)
    request = read(4096, 512)

    assert [0] == machine.do(chain, request)
    assert bytes(512) == content(request)
    chain.close()
