"""The base classes of the contract."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.helpers_block import Bottom, StepEnv, discard, flush, read, write
from xenbackend.block.driver import BlockingDriver, Driver, Filter, Geometry, SimpleDriver
from xenbackend.block.request import Request
from xenbackend.errors import DriverError


def picky(base: type[SimpleDriver]) -> SimpleDriver:
    """Return a driver whose reads succeed and whose writes find no space."""

    class Picky(base):
        name = "picky"

        def read(self, request: Request) -> None:
            request.iov[0][:] = b"r" * request.length

        def write(self, request: Request) -> None:
            raise OSError(errno.ENOSPC, "full")

    return Picky(None)


@pytest.mark.parametrize("base", [SimpleDriver, BlockingDriver])
def test_an_oserror_becomes_the_status_of_its_request(base: type[SimpleDriver]) -> None:
    """If a driver's method raises OSError, its errno becomes the request's status. Operations that are not implemented
    end with EOPNOTSUPP, but a flush succeeds.
    """
    driver, done = picky(base), []
    driver.env = StepEnv()
    driver.complete = done.extend
    batch = [read(0, 512), write(0, bytes(512)), flush(), discard(0, 512)]
    driver.submit(list(batch))

    assert batch == done
    assert [0, errno.ENOSPC, 0, errno.EOPNOTSUPP] == [request.status for request in batch]


def test_a_simple_driver_gives_a_batch_back_as_one() -> None:
    """Requests that are done at once come back in one batch (D2), and requests on threads one by one."""
    for base, expected in ((SimpleDriver, [2]), (BlockingDriver, [1, 1])):
        driver, sizes = picky(base), []
        driver.env = StepEnv()
        driver.complete = lambda batch, sizes=sizes: sizes.append(len(batch))
        driver.submit([read(0, 512), flush()])

        assert expected == sizes


def test_physical_sectors() -> None:
    """The physical sector is never smaller than the sector, even if a filter makes sectors larger."""
    disk = Geometry(1 << 20, physical_sector_size=1024)

    assert [512, 4096] == [Geometry(512).physical_sector_size, Geometry(4096, 4096).physical_sector_size]
    assert [1024, 4096] == [replace(disk, read_only=True).physical_sector_size,
                            replace(disk, sector_size=4096).physical_sector_size]  # fmt: skip


def test_a_filter_as_it_stands_passes_everything_on() -> None:
    """A filter that overrides nothing has the geometry of the layer below and passes on each batch as it is."""
    layer, bottom, batch = Filter(None), Bottom(), [flush()]
    layer.next, layer.below = bottom, Geometry(512)
    layer.submit(batch)

    assert Geometry(512) == layer.open(StepEnv())
    assert [batch] == bottom.batches


def test_a_driver_that_is_not_wired_says_so() -> None:
    """A driver that is not wired raises when it completes requests that nobody would get, and shows them."""
    with pytest.raises(RuntimeError, match="FLUSH 0"):
        Bottom().complete([flush()])


def test_a_driver_knows_no_verbs() -> None:
    """A verb that a layer does not know is refused, and the error names the layer."""
    with pytest.raises(DriverError, match="bottom: does not know the verb 'get'"):
        Bottom().control("get", [])


def test_a_driver_must_write_open_and_submit() -> None:
    """The base class implements neither `open` nor `submit`: a driver must."""
    for call in (lambda: Driver(None).open(StepEnv()), lambda: Driver(None).submit([])):
        with pytest.raises(NotImplementedError):
            call()
