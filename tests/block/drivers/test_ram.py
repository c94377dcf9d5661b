"""The driver ram."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers_block import Machine, StepEnv, content, discard, image, read, write
from xenbackend.block.drivers.ram import Ram
from xenbackend.errors import ChainError, DriverError


def opened(content: int | str, env: StepEnv) -> Ram:
    """Return an open driver."""
    driver = Ram(Ram.Options(content))
    driver.env = env
    driver.complete = lambda batch: None
    driver.open(env)
    return driver


def test_a_successor_finds_what_was_written() -> None:
    """The content is in memory that outlives the worker: who opens the same disk again finds it."""
    env = StepEnv()
    opened(1 << 20, env).submit([write(512, b"mine" * 128)])
    request = read(512, 512)
    opened(1 << 20, env).submit([request])

    assert b"mine" * 128 == content(request)


def test_a_file_is_read_once(machine: Machine, tmp_path: Path) -> None:
    """The file's content is there at first; a successor keeps what the guest wrote, and the file is never written."""
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
    """The mark that the file was read is set last."""
    path = image(tmp_path / "img", 4096)
    env = StepEnv(files=machine.files)
    opened(str(path), env)
    env.memories["state"][0] = 0
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


@pytest.mark.parametrize("text", ["ram:64P", "ram:9999999P", "ram:0"])
def test_a_disk_that_the_host_cannot_hold_is_refused(machine: Machine, text: str) -> None:
    """A size without memory behind it is an error of opening and not of the first write."""
    with pytest.raises(DriverError, match=r"ram:.*option content"):
        machine.open(text)


def test_what_is_neither_size_nor_file_is_refused(machine: Machine) -> None:
    """A file is told by its first character; everything else must be a size."""
    with pytest.raises(ChainError, match="is not a size"):
        machine.open("ram:img")
