"""Tests of `xenbackend.ceph.cluster`: the steps that lock out a client, in order; tests/engines has a real cluster."""

from __future__ import annotations

import ctypes
import errno
import json
from types import SimpleNamespace
from typing import Any

import pytest

from xenbackend.ceph import cluster as module
from xenbackend.ceph.cluster import FORCED, Cluster
from xenbackend.errors import DriverError

DEAD = "10.0.0.1:0/7"


class Librados:
    """Records calls; `fails` is the result of commands to the monitors."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.settings: dict[str, str] = {}
        self.fails = 0

    def rados_create2(self, *_: object) -> int:
        """Make a client."""
        return 0

    def rados_conf_set(self, _handle: object, name: bytes, value: bytes) -> int:
        """Record a setting; the last one of its name holds."""
        self.settings[name.decode()] = value.decode()
        return 0

    def rados_connect(self, _handle: object) -> int:
        """Connect."""
        return 0

    def rados_mon_command(self, _handle: object, text: Any, *_: object) -> int:
        """Record a command."""
        order = json.loads(ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] or b"")
        self.calls.append(" ".join(str(each) for each in order.values()))
        return -self.fails

    def rados_buffer_free(self, _buffer: object) -> None:
        """Free the monitors' answer."""

    def rados_wait_for_latest_osdmap(self, _handle: object) -> int:
        """Record the wait for the latest map."""
        self.calls.append("map")
        return 0


@pytest.fixture
def librados(monkeypatch: pytest.MonkeyPatch) -> Librados:
    """Return a stand-in for librados."""
    found = Librados()
    monkeypatch.setattr(module, "load", lambda: SimpleNamespace(rados=found))
    return found


def test_whoever_refuses_a_client_knows_the_map_in_which_it_is_refused(librados: Librados) -> None:
    """After a client is blocklisted the latest map is awaited: no OSD then does what the dead client had sent."""
    Cluster("xen", {}).refuse(DEAD, 60)
    assert [f"osd blocklist add {DEAD} 60.0", "map"] == librados.calls


def test_a_client_that_is_not_refused_is_an_error(librados: Librados) -> None:
    """If the monitors refuse the command, the error has the errno that tells of a missing right."""
    librados.fails = errno.EACCES
    with pytest.raises(DriverError, match="osd blocklist") as caught:
        Cluster("xen", {}).refuse(DEAD, 60.0)
    assert errno.EACCES == caught.value.errno


def test_no_setting_beats_what_is_forced(librados: Librados) -> None:
    """Settings that the service forces, so that nothing is lost, override those of the configuration."""
    Cluster("xen", {**dict.fromkeys(FORCED, "wished"), "rbd_op_threads": "3"})
    assert {**FORCED, "rbd_op_threads": "3"} == librados.settings
