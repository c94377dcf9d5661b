"""The driver ram."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers_block import Machine, StepEnv, content, discard, image, read, write
from tests.memories import Memories
from xenbackend.block.drivers.ram import Ram
from xenbackend.errors import ChainError, DriverError
from xenbackend.worker.env import EnvFactory


def opened(content: int | str, env: StepEnv) -> Ram:
    """Return an open driver."""
    driver = Ram(Ram.Options(content))
    driver.env = env
    driver.complete = lambda batch: None
    driver.open(env)
    return driver


def test_a_successor_finds_what_was_written() -> None:
    """The content is in memory that outlives the worker, so a successor finds it."""
    env = StepEnv()
    opened(1 << 20, env).submit([write(512, b"mine" * 128)])
    request = read(512, 512)
    opened(1 << 20, env).submit([request])

    assert b"mine" * 128 == content(request)


def test_a_file_is_read_once(machine: Machine, tmp_path: Path) -> None:
    """The disk begins with the file's content. The file is never written, and a successor keeps the guest's writes."""
    path = image(tmp_path / "img", 3 << 20)
    path.write_bytes(b"file" * (3 << 18))
    env = StepEnv(files=machine.files)
    first, second = read((3 << 20) - 512, 512), read(0, 512)
    driver = opened(str(path), env)
    driver.submit([first])
    driver.submit([write(0, b"new!" * 128)])
    opened(str(path), env).submit([second])

    assert b"file" * 128 == content(first)
    assert b"new!" * 128 == content(second)
    assert path.read_bytes() == b"file" * (3 << 18)


def test_a_worker_that_dies_while_it_reads_the_file_has_not_loaded(machine: Machine, tmp_path: Path) -> None:
    """If a worker dies while it reads the file, the memory lacks the mark that is set last, and is filled again."""
    path = image(tmp_path / "img", 4096)
    env = StepEnv(files=machine.files)
    opened(str(path), env)
    env.memories["disk"][0] = 0
    path.write_bytes(b"z" * 4096)
    request = read(0, 512)
    opened(str(path), env).submit([request])

    assert b"z" * 512 == content(request)


def test_a_discard_is_exact(machine: Machine) -> None:
    """A discard of any length sets its own range to zeros and no other byte."""
    chain = machine.open("ram:4M")
    machine.do(chain, write(0, b"x" * (4 << 20)))
    machine.do(chain, discard(512, (3 << 20) + 512))
    request = read(0, 4 << 20)
    machine.do(chain, request)
    chain.close()

    end = 512 + (3 << 20) + 512
    assert b"x" * 512 + bytes(end - 512) + b"x" * ((4 << 20) - end) == content(request)


def test_a_discard_gives_memory_back_and_takes_none(machine: Machine) -> None:
    """A discard returns whole pages to the host, and one of ranges that were never written allocates no pages."""
    memories = Memories()
    machine.make_env = EnvFactory(machine.reactor, machine.files, make=memories.make)
    chain = machine.open("ram:4M")
    [kept] = memories.kept.values()
    empty = os.fstat(kept).st_blocks
    machine.do(chain, discard(0, 4 << 20))
    untouched = os.fstat(kept).st_blocks
    machine.do(chain, write(0, b"x" * (2 << 20)))
    machine.do(chain, discard(0, 4 << 20))
    given_back = os.fstat(kept).st_blocks
    chain.close()
    os.close(kept)

    assert [empty, empty] == [untouched, given_back]


def test_no_discard_where_the_memory_takes_no_holes() -> None:
    """If the memory is not a mapping, it cannot return pages, so the disk offers no discard."""
    env = StepEnv()
    driver = Ram(Ram.Options(4096))

    assert (False, 0) == (driver.open(env).can_discard, driver.open(env).discard_granularity)


@pytest.mark.parametrize("is_file", [False, True])
def test_a_guest_that_goes_on_gets_no_fresh_disk(machine: Machine, tmp_path: Path, is_file: bool) -> None:
    """If the content was lost with the service's memory, opening fails, unless the disk is read-only."""
    what = str(image(tmp_path / "img", 4096)) if is_file else 4096
    with pytest.raises(DriverError, match="was lost with the service's memory; detach the disk and attach it again"):
        opened(what, StepEnv(files=machine.files, resumes=True))

    opened(what, StepEnv(files=machine.files, resumes=True, read_only=True))


def test_a_guest_that_goes_on_finds_its_own_disk() -> None:
    """A disk whose memory was kept is opened for the guest that used it, whether that has written to it or not."""
    env = StepEnv()
    opened(4096, env)
    env.resumes = True
    request = read(0, 512)
    opened(4096, env).submit([request])

    assert bytes(512) == content(request)


@pytest.mark.parametrize("text", ["ram:64P", "ram:9999999P", "ram:0"])
def test_a_disk_that_the_host_cannot_hold_is_refused(machine: Machine, text: str) -> None:
    """A size that the host's memory cannot hold is refused when the disk is opened, not at the first write."""
    with pytest.raises(DriverError, match=r"ram:.*option content"):
        machine.open(text)


def test_what_is_neither_size_nor_file_is_refused(machine: Machine) -> None:
    """A target that begins with a slash or a dot is a file. Anything else must be a size."""
    with pytest.raises(ChainError, match="is not a size"):
        machine.open("ram:img")
