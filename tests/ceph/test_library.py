"""Tests of `xenbackend.ceph.library`: a host without Ceph's library, and results that are errors."""

from __future__ import annotations

import errno

import pytest

from xenbackend.ceph import library
from xenbackend.errors import DriverError


def test_a_host_without_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library each use of it raises the same sentence, and the search is not repeated."""
    monkeypatch.setattr(library, "_loaded", "")
    monkeypatch.setattr(library, "RADOS", "libnonesuch.so.2")
    for _ in range(2):
        with pytest.raises(DriverError, match=r"libnonesuch\.so\.2.*librbd1") as caught:
            library.load()
        assert errno.ENOPKG == caught.value.errno
        monkeypatch.setattr(library, "RADOS", "librados.so.2")


def test_results() -> None:
    """A negative result is raised as an error with a sentence."""
    assert 3 == library.check(3, "do it")
    with pytest.raises(DriverError, match="do it: Permission denied") as caught:
        library.check(-errno.EACCES, "do it")
    assert errno.EACCES == caught.value.errno
