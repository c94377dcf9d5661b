"""Tests of `xenbackend.worker.env`."""

import os
from collections.abc import Iterator

import pytest
from descriptors import open_descriptors

from tests.memories import Memories
from xenbackend.block.driver import Env
from xenbackend.kernel import memfd
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.files import HostFiles


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a reactor."""
    made = Reactor()
    yield made
    made.close()


def test_env_is_what_the_contract_asks_for(reactor: Reactor) -> None:
    """A layer gets the worker's clock, timers, threads and files, and flags and facts of its own."""
    files = HostFiles(reactor)
    factory = EnvFactory(reactor, files)
    env: Env = factory("ram:1M", read_only=True, shareable=True)
    other = factory("log:")
    env.report("mode", "memory")
    done: list[str] = []
    env.run_in_thread(lambda: done.append("thread"), lambda: env.call_later(0, reactor.stop))
    reactor.run()

    assert (env.read_only, env.shareable, env.files) == (True, True, files)
    assert (factory("ram:1M").facts, other.facts, done) == ({}, {}, ["thread"])
    assert env.facts == {"mode": "memory"}  # only the worker's own Env has them


def test_memory_outlives_the_process_that_made_it(reactor: Reactor) -> None:
    """A successor that gets the kept descriptors finds the same bytes under the same layer and name."""
    memories = Memories()
    files = HostFiles(reactor)
    first = EnvFactory(reactor, files, make=memories.make)
    view = first("0 log:").memory("dirty", 8192)
    zero = bytes(view)
    view[5000:5005] = b"dirty"
    first.close()

    again = EnvFactory(reactor, files, memories=memories.kept, make=lambda *_: pytest.fail("there already"))
    second = again("0 log:").memory("dirty", 8192)
    again.close()

    assert zero == bytes(8192)
    assert bytes(second[5000:5005]) == b"dirty"


def test_only_the_first_chain_goes_on_with_a_guest(reactor: Reactor) -> None:
    """Only the first chain of a worker goes on with a guest; a chain that replaces it was not served before."""
    factory = EnvFactory(reactor, HostFiles(reactor), resumes=True, continues=True)
    first = factory("rbd-7")
    factory.drop_unwanted()
    second = factory("rbd-8")

    assert [(True, True), (True, False)] == [(each.resumes, each.continues) for each in (first, second)]
    assert not EnvFactory(reactor, HostFiles(reactor))("rbd-7").continues


def test_a_layer_may_end_its_process(reactor: Reactor) -> None:
    """A layer's reason to give up is passed on with the layer's name; where no successor follows, nothing is done."""
    said: list[str] = []
    factory = EnvFactory(reactor, HostFiles(reactor), give_up=said.append)
    factory("rbd-7").give_up("the cluster refuses it")
    EnvFactory(reactor, HostFiles(reactor))("rbd-7").give_up("the cluster refuses it")

    assert ["the layer rbd-7: the cluster refuses it"] == said


def test_a_layer_may_alarm(reactor: Reactor) -> None:
    """A layer's alarm is passed on with the layer's name; in a command it is dropped."""
    said: list[str] = []
    EnvFactory(reactor, HostFiles(reactor), alarm=said.append)("cache-7").alarm("it was closed")
    EnvFactory(reactor, HostFiles(reactor))("cache-7").alarm("it was closed")

    assert ["the layer cache-7: it was closed"] == said


def test_memory_of_another_layer_or_size_is_fresh(reactor: Reactor) -> None:
    """Memory of another layer, or of another size, is made anew."""
    made: list[tuple[str, int]] = []

    def make(name: str, size: int) -> int:
        made.append((name, size))
        return memfd.make("test", size)

    old = memfd.make("old", 4096)
    os.pwrite(old, b"x" * 4096, 0)
    factory = EnvFactory(reactor, HostFiles(reactor), memories={"a:m": old}, make=make)

    assert bytes(factory("b").memory("m", 4096)) == bytes(4096)
    assert bytes(factory("a").memory("m", 8192)) == bytes(8192)
    assert made == [("b:m", 4096), ("a:m", 8192)]
    factory.close()


def test_memory_that_could_be_cut_short_is_fresh(reactor: Reactor) -> None:
    """A kept memory whose size can change is not used, since a hostile predecessor may have left it: touching it could
    kill us.
    """
    old = os.memfd_create("old")
    os.pwrite(old, b"x" * 4096, 0)
    factory = EnvFactory(reactor, HostFiles(reactor), memories={"a:m": old}, make=lambda _, size: memfd.make("m", size))
    view = factory("a").memory("m", 4096)

    assert bytes(4096) == bytes(view)
    assert memfd.is_sealed(factory._memories["a:m"], 4096)
    factory.close()


def test_who_only_looks_needs_no_descriptor(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private memory is of zeros, the same for a layer that asks again, fresh in another size, and no memfd: a worker
    behind its walls cannot make one, and probes chains, too.
    """
    monkeypatch.delattr(os, "memfd_create")
    factory = EnvFactory(reactor, HostFiles(reactor))
    view = factory("a").memory("m", 4096)
    zero = bytes(view)
    view[:4] = b"same"
    view.release()

    assert (bytes(4096), b"same") == (zero, bytes(factory("a").memory("m", 4096)[:4]))
    assert bytes(8192) == bytes(factory("a").memory("m", 8192))
    factory.close()


def test_no_descriptor_is_leaked(reactor: Reactor) -> None:
    """No memory leaves a descriptor open, not even one that no layer has asked for."""
    files = HostFiles(reactor)
    before = open_descriptors()
    gone = {"gone:m": os.memfd_create("m")}
    factory = EnvFactory(reactor, files, memories=gone, make=lambda _, size: memfd.make("m", size))
    view = factory("a").memory("m", 4096)
    factory.close()
    del view

    assert open_descriptors() == before


def test_memories_that_no_layer_asks_for_any_more_are_dropped(reactor: Reactor) -> None:
    """When layers have been opened anew, exactly the memories that none of them has asked for are dropped, by name."""
    dropped: list[str] = []
    before = open_descriptors()
    factory = EnvFactory(reactor, HostFiles(reactor), drop=dropped.append)
    for name in ("stays", "goes"):
        factory(name).memory("m", 4096)[:4] = b"data"
    factory.begin()
    again = factory("stays").memory("m", 4096)
    factory("comes").memory("m", 4096)
    factory.drop_unwanted()
    fresh = factory("goes").memory("m", 4096)

    assert ["goes:m"] == dropped
    assert [b"data", bytes(4)] == [bytes(view[:4]) for view in (again, fresh)]
    factory.close()
    del again, fresh
    assert open_descriptors() == before
