"""Tests of `xenbackend.kernel.xen`."""

from pathlib import Path

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel.ports import open_host


def test_host_is_found_by_its_text() -> None:
    """`open_host` finds the real host by its module's name; it has a fence and page-aligned memory."""
    host = open_host("xenbackend.kernel.xen")

    assert host.fence() is None
    assert host.allocate(8192).address % 4096 == 0


def test_devices_that_are_absent_are_said() -> None:
    """On a machine without Xen the error names the device that cannot be opened."""
    if Path("/dev/xen/gntdev").exists():
        pytest.skip("this is a Xen host")
    host = open_host("xenbackend.kernel.xen")

    with pytest.raises(KernelError, match="open /dev/xen/gntdev: "):
        host.open_grants(1)
    with pytest.raises(KernelError, match="open /dev/xen/evtchn: "):
        host.open_events(1)
