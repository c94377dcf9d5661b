"""Reading the layers below a filter while that filter is being opened."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from tests.helpers_block import Machine, content, read
from xenbackend.block.looking import look


def test_any_bytes_of_a_chain_are_read(machine: Machine, tmp_path: Path) -> None:
    """Any range is read, aligned or not, and the chain works afterwards as if nobody had read from it."""
    path, data = tmp_path / "img", Random(1).randbytes(1 << 20)
    path.write_bytes(data)
    chain = machine.open(f"delay:read=1us|log:{tmp_path}/rec|aio:{path}", checked=False)
    layers = [each.driver for each in chain.layers]
    for offset, length in ((0, 1), (511, 2), (1000, 70000), ((1 << 20) - 3, 3)):
        assert data[offset : offset + length] == look(layers, layers[0].env, offset, length)
    whole = read(0, 1 << 20)
    assert [0] == machine.do(chain, whole)
    assert data == content(whole)
    chain.close()


def test_a_layer_that_fails_is_an_error(machine: Machine) -> None:
    """If the read fails, the status of the layer below is the errno of the error that is raised."""
    chain = machine.open("fault:errno=ENODATA|ram:1M", checked=False)
    layers = [each.driver for each in chain.layers]
    with pytest.raises(OSError, match="No data available") as caught:
        look(layers, layers[0].env, 0, 512)
    assert caught.value.errno == errno.ENODATA
    chain.close()
