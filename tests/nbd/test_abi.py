"""The constants of NBD, compared with what another implementation sends and expects."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from xenbackend.nbd import abi
from xenbackend.nbd.abi import Export


@pytest.mark.parametrize(
    ("export", "flags"),
    [
        (Export(512), 0b1_0000_1101),
        (Export(512, can_trim=True), 0b1_0010_1101),
        (Export(512, can_flush=False), 0b1_0000_0001),
        (Export(512, read_only=True, can_trim=True), 0b1_0000_0011),
    ],
)
def test_flags(export: Export, flags: int) -> None:
    """FUA is offered exactly if flush is, and a read-only disk offers nothing that alters it."""
    assert flags == export.flags


def test_layouts() -> None:
    """Headers have the sizes that the protocol defines."""
    layouts = (abi.OPTION, abi.OPTION_REPLY, abi.EXPORT_NAME_REPLY, abi.REQUEST, abi.REPLY)

    assert [16, 20, 10, 28, 16] == [layout.size for layout in layouts]


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")
def test_magics_are_those_of_another_server() -> None:
    """The greeting begins like nbdkit's."""
    server = subprocess.Popen(
        ["nbdkit", "--single", "null"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    greeting = server.stdout.read(18)
    server.communicate()

    assert abi.NBDMAGIC + abi.IHAVEOPT == greeting[:16]
