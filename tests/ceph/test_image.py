"""Tests of `xenbackend.ceph.image`: an image is closed while another thread uses it; tests/engines has real images."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.ceph.image import Image
from xenbackend.errors import DriverError

SIZE = 1 << 20


class Library:
    """A librbd whose answer about a size can be delayed; records what is called, and with which image."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()
        self.calls: list[tuple[str, int | None]] = []
        self.interrupts = False

    def rbd_open(self, _pool: object, _name: bytes, handle: Any, _snapshot: object) -> int:
        """Open it as number 7."""
        handle._obj.value = 7
        return 0

    def rbd_get_size(self, handle: ctypes.c_void_p, size: Any) -> int:
        """Answer once the test allows it."""
        self.calls.append(("asked", handle.value))
        self.asked.set()
        assert self.answers.wait(10)
        self.calls.append(("answered", handle.value))
        size._obj.value = SIZE
        return 0

    def rbd_diff_iterate2(self, *arguments: Any) -> int:
        """Report ranges while somebody presses Ctrl-C; exceptions in the callback are swallowed, as by ctypes."""
        *_, take, nothing = arguments
        for number in range(1000):
            try:
                if number == 1 and self.interrupts:
                    os.kill(os.getpid(), signal.SIGINT)
                    assert self.answers.wait(10)
                code = int(take(number * 512, 512, 1, nothing))
            except KeyboardInterrupt:
                code = 0
            if code < 0:
                self.calls.append(("left", None))
                return code
        return 0

    def rbd_close(self, handle: ctypes.c_void_p) -> int:
        """Close it."""
        self.calls.append(("closed", handle.value))
        return 0


@pytest.fixture
def library() -> Library:
    """Return a stand-in for librbd."""
    return Library()


@pytest.fixture
def image(library: Library) -> Image:
    """Return an open image."""
    cluster: Any = SimpleNamespace(library=SimpleNamespace(rados=library, slow=library), user="xen")
    pool: Any = SimpleNamespace(handle=None)
    return Image(cluster, pool, "disk", read_only=False)


def test_it_is_not_closed_below_a_thread_that_asks_for_its_size(library: Library, image: Image) -> None:
    """As librbd frees an image that is closed, a thread that is asking is answered first."""
    sizes: list[int] = []
    asks = threading.Thread(target=lambda: sizes.append(image.size()))
    asks.start()
    assert library.asked.wait(10)
    closes = threading.Thread(target=image.close)
    closes.start()
    closes.join(0.1)
    library.answers.set()
    for each in (asks, closes):
        each.join(10)
    assert [SIZE] == sizes
    assert [("asked", 7), ("answered", 7), ("closed", 7)] == library.calls


def test_nobody_asks_a_closed_image(library: Library, image: Image) -> None:
    """A thread that asks a closed image gets an error, and librbd is not called; nor is the image closed twice."""
    image.close()
    image.close()
    with pytest.raises(DriverError, match="size") as caught:
        image.size()
    assert errno.EBADF == caught.value.errno
    assert [("closed", 7)] == library.calls


def test_what_has_changed_is_told_whole_or_not_at_all(library: Library, image: Image) -> None:
    """Ctrl-C during a listing of changed ranges is raised, and no part of the list is returned; close still works."""
    assert [(number * 512, 512, True) for number in range(1000)] == image.diff("", 0, SIZE)
    library.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        image.diff("", 0, SIZE)
    library.answers.set()
    image.close()
    assert [("left", None), ("closed", 7)] == library.calls
    with pytest.raises(DriverError) as caught:
        image.diff("", 0, SIZE)
    assert errno.EBADF == caught.value.errno
