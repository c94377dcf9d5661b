"""Tests of `xenbackend.worker.image`; test_files.py has what all ways of doing I/O have in common."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from xenbackend.block.request import Op, Request
from xenbackend.errors import XenbackendError
from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Alignment
from xenbackend.loop.reactor import Reactor
from xenbackend.worker.image import Image


@pytest.fixture
def image() -> Iterator[Image]:
    """Return 64 KiB of `x` in memory, as an image with blocking I/O."""
    fd = os.memfd_create("image")
    os.pwrite(fd, b"x" * 65536, 0)
    reactor = Reactor()
    made = Image(fd, blockdev.examine(fd, "image", read_only=False), None, reactor, None)
    yield made
    made.close()
    reactor.close()


def read_of(offset: int, length: int) -> Request:
    """Return a read into memory that is not zero."""
    request = Request()
    request.op, request.offset, request.length = Op.READ, offset, length
    request.iov = [memoryview(bytearray(b"\xff" * length))]
    return request


def test_image_that_became_shorter(image: Image) -> None:
    """Reading what an image has lost since it was opened is an error, and not zeros."""
    os.ftruncate(image.fd, 4096)
    read = read_of(0, 8192)
    image.do(read)

    assert read.status == errno.EIO


def test_a_read_while_the_image_grows(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another thread makes the file longer after a read has come to its end, the read has lost nothing."""
    preadv = os.preadv

    def read_then_grow(fd: int, views: list[memoryview], offset: int) -> int:
        moved = preadv(fd, views, offset)
        if not moved:
            image.grow(131072)
        return moved

    monkeypatch.setattr(os, "preadv", read_then_grow)
    read = read_of(61440, 8192)
    image.do(read)

    assert (0, b"x" * 4096 + bytes(4096)) == (read.status, bytes(read.iov[0]))


@pytest.mark.rows("R10")
def test_long_read_past_the_end_is_cleared(image: Image) -> None:
    """The part of a read past the end is zeros, however long it is."""
    read = read_of(32768, 400_384)
    image.do(read)

    assert read.status == 0
    assert bytes(read.iov[0]) == b"x" * 32768 + bytes(400_384 - 32768)


def test_discard_that_was_not_offered(image: Image) -> None:
    """A discard that was not offered ends with EOPNOTSUPP."""
    image.can_discard = False
    discard = Request()
    discard.op, discard.length = Op.DISCARD, 4096
    image.do(discard)

    assert discard.status == errno.EOPNOTSUPP


def test_a_block_device_does_not_grow(image: Image) -> None:
    """A block device cannot grow, which is an error like a full disk."""
    image.medium = replace(image.medium, is_device=True)
    with pytest.raises(OSError, match="cannot grow") as caught:
        image.grow(131_072)

    assert (errno.ENOSPC, 65536, 65536) == (caught.value.errno, image.size, os.fstat(image.fd).st_size)


def test_a_file_ends_where_direct_io_can_reach(image: Image) -> None:
    """A length that direct I/O could not write is refused, and the file stays as it is."""
    image._alignment = Alignment(512, 4096)
    for size, tail in ((65536 + 512, b""), (65536 + 4096, b"t" * 8192)):
        with pytest.raises(OSError, match="cannot make the file end there"):
            image.grow(size, tail)

    assert (65536, 65536) == (image.size, os.fstat(image.fd).st_size)


def test_results_of_asynchronous_io(image: Image) -> None:
    """An error becomes the request's status; a request that was done in part is repeated as a whole."""
    failed, flushed, short = read_of(0, 4096), Request(), read_of(4096, 4096)
    flushed.op, flushed.length = Op.FLUSH, 0
    back: list[Request] = []
    image.complete = lambda batch: (back.extend(batch), image._reactor.stop())

    assert (image.settle(failed, -errno.EIO), failed.status) == (True, errno.EIO)
    assert (image.settle(flushed, 0), flushed.status) == (True, 0)
    assert not image.settle(short, 512)
    image._reactor.run()
    assert (back, short.status, bytes(short.iov[0])) == ([short], 0, b"x" * 4096)


def test_requests_need_an_owner(image: Image) -> None:
    """Submitting requests to an image before it has an owner is an error."""
    with pytest.raises(XenbackendError, match="before it had an owner"):
        image.submit([read_of(0, 4096)])
