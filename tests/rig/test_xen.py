"""The simulated hypervisor as a server."""

from __future__ import annotations

import errno
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.rig import wire
from xenbackend.rig.guest import Guest
from xenbackend.rig.xen import Xen


def test_two_guests_have_their_own_memory(xen: Xen) -> None:
    """Guests share nothing, and a domid is taken while its guest lives."""
    one, two = Guest(xen.directory, 1, pages=4), Guest(xen.directory, 2, pages=4)
    one.memory[0] = 1

    assert 0 == two.memory[0]
    with pytest.raises(KernelError) as caught:
        Guest(xen.directory, 1)
    assert errno.EEXIST == caught.value.errno
    one.close()
    Guest(xen.directory, 1, pages=4).close()
    two.close()


@pytest.mark.parametrize(
    "datagram", [b"{", b"[]", b"{}", b'{"call": "open"}', b'{"call": "map", "domid": {}}', b"\xff"]
)
def test_garbage_is_answered(xen: Xen, datagram: bytes) -> None:
    """Whatever a user sends is answered with an error, and the server continues."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(xen.directory / wire.SOCKET))
    client.send(datagram)
    answer, _ = wire.receive(client)
    client.close()

    assert errno.EBADMSG == answer["errno"]
    assert {"mappings": 0, "pins": 0, "ports": 0} == xen.held()


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    """A closed server leaves no descriptor and no socket, whatever was connected."""
    before = len(open_descriptors())
    with Xen(tmp_path) as xen:
        guest = Guest(tmp_path, 1, pages=4)
        xen.held()
    guest.close()
    del guest

    assert before == len(open_descriptors())
    assert [] == list(tmp_path.iterdir())


def test_users_see_it_end(tmp_path: Path) -> None:
    """A call to a server that has gone raises an error at once."""
    with Xen(tmp_path):
        guest = Guest(tmp_path, 1, pages=4)
    with pytest.raises(KernelError):
        guest.allocate_port()
    guest.close()


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """Run as a process, it serves and ends on SIGTERM."""
    code = "from xenbackend.rig import xen; print('up', flush=True); xen.main()"
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]; " + code], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        guest = connect_when_up(tmp_path, process)
        guest.close()
        process.send_signal(signal.SIGTERM)

        assert 0 == process.wait()


def connect_when_up(directory: Path, process: subprocess.Popen) -> Guest:
    """Create a guest as soon as the server listens."""
    while process.poll() is None:
        try:
            return Guest(directory, 1, pages=4)
        except KernelError:
            continue
    raise AssertionError("the server ended by itself")
