"""Tests of `xenbackend.kernel.ioctl`."""

import errno
import os
import struct
import termios
from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import ioctl


def test_number_is_that_of_the_header() -> None:
    """A request number holds size, kind and number as asm-generic/ioctl.h lays them out."""
    assert ioctl.number("G", 0, 24) == 0x00184700


def test_bytearray_is_changed_in_place() -> None:
    """What the kernel writes arrives in the caller's bytearray, even one longer than Python's own buffer."""
    reader, writer = os.pipe()
    os.write(writer, b"12345")
    argument = bytearray(4096)

    result = ioctl.call(reader, termios.FIONREAD, argument, "count bytes")

    assert (result, struct.unpack_from("i", argument)[0]) == (0, 5)
    os.close(reader)
    os.close(writer)


def test_refusal_names_the_operation() -> None:
    """An ioctl that the kernel refuses raises KernelError with the operation in words and the errno."""
    with Path(os.devnull).open("rb") as device, pytest.raises(KernelError, match="map 3 grants: ") as caught:
        ioctl.call(device.fileno(), 0x00184700, bytes(24), "map 3 grants")

    assert caught.value.errno == errno.ENOTTY
