"""Attach and detach without xl, against a registry in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path, PosixPath

import pytest

from tests.supervisor.helpers import PATH, Stepped, offer_ring
from xenbackend.errors import ChainError, ConfigError, XenbackendError
from xenbackend.protocol.client import ServiceError
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.xenstore.paths import libxl_path
from xenbackend.supervisor.xenstore.store import Store
from xenbackend.supervisor.xenstore.toolstack import (
    Attachment,
    attach,
    detach,
    vbd_path,
    wait_until_connected,
    wait_until_there,
)

pytestmark = pytest.mark.slow  # every one starts processes


@pytest.fixture
def service(xenstored: Xenstored, tmp_path: Path) -> Iterator[str]:
    """The control socket of a registry whose loop runs in a thread."""
    socket = str(tmp_path / "control.sock")
    stepped = Stepped(xenstored.address, Settings(), socket=socket, runs_script=False)
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            stepped.turn(0.01)

    thread = threading.Thread(target=loop)
    thread.start()
    yield socket
    is_over.set()
    thread.join()
    stepped.close()


def test_attach_and_detach(service: str, toolstack: Store, guest: Store) -> None:
    """`attach` makes the frontend's directory after the chain is open, and libxl's entry; `detach` leaves nothing."""
    path = vbd_path(toolstack, 5, "xvda")
    attach(toolstack, Attachment(path, "null:1G", read_only=True), service)
    back, front = toolstack.dictionary(path.backend), toolstack.dictionary(path.frontend)
    entry = toolstack.dictionary(libxl_path(path))
    permissions = (
        toolstack.get_permissions(path.backend),
        toolstack.get_permissions(f"{path.backend}/state"),
        toolstack.get_permissions(path.frontend),
    )
    offer_ring(guest)
    wait_until_connected(toolstack, path, 20)
    guest.write(f"{path.frontend}/state", "6")
    detach(toolstack, path, 20)

    assert PATH == path
    assert ("2", "r", "connected", "4") == (back["state"], back["mode"], back["hotplug-status"], back["info"])
    assert ("1", path.backend, "51712") == (front["state"], front["backend"], front["virtual-device"])
    assert (path.backend, "/etc/xen/scripts/block-xenbackend") == (entry["backend"], entry["script"])
    assert (["n0", "r5"], ["n0", "r5"], ["n5", "r0"]) == permissions
    assert [[], [], []] == [toolstack.directory(each) for each in (path.backend, path.frontend, libxl_path(path))]


def test_chain_that_does_not_open_is_told_and_taken_back(service: str, toolstack: Store, guest: Store) -> None:
    """If the chain cannot be opened, the operator gets the service's sentence, the guest never sees the disk, and
    nothing is left. The code says whose mistake it is, as with `set`.
    """
    del guest
    with pytest.raises(ServiceError, match="null: it is broken") as caught:
        attach(toolstack, Attachment(PATH, "null:2G"), service)

    assert Code.INVALID is caught.value.answer.code
    assert [[], [], []] == [toolstack.directory(each) for each in (PATH.backend, PATH.frontend, libxl_path(PATH))]


def test_a_bad_chain_touches_nothing(toolstack: Store) -> None:
    """An invalid chain is refused before anything is written to xenstore."""
    with pytest.raises(ChainError):
        attach(toolstack, Attachment(PATH, "log:|"), "/nowhere")

    assert [] == toolstack.directory(PATH.backend)


def test_no_service_is_told(toolstack: Store) -> None:
    """Without a service `attach` fails at once, and changes nothing."""
    with pytest.raises(XenbackendError, match="no service answers at /nowhere; start it with"):
        attach(toolstack, Attachment(PATH, "null:1G"), "/nowhere")

    assert [] == toolstack.directory(PATH.backend)


def test_place_that_is_taken_and_domain_that_is_missing(service: str, toolstack: Store) -> None:
    """A device number in use, and a domain that does not exist, are refused with a sentence."""
    attach(toolstack, Attachment(PATH, "null:1G"), service)
    with pytest.raises(ConfigError, match="there is already a disk 5/xvda"):
        attach(toolstack, Attachment(PATH, "null:1G"), service)
    with pytest.raises(ConfigError, match="there is no domain 77"):
        attach(toolstack, Attachment(vbd_path(toolstack, 77, "xvda"), "null:1G"), service)
    with pytest.raises(ConfigError, match="xenbackend serves no disk 5/xvdb"):
        detach(toolstack, vbd_path(toolstack, 5, "xvdb"))


def test_disk_in_use_goes_only_with_force(service: str, toolstack: Store, guest: Store) -> None:
    """A guest that does not release its disk keeps it, until force removes the frontend's directory."""
    attach(toolstack, Attachment(PATH, "null:1G"), service)
    offer_ring(guest)
    wait_until_connected(toolstack, PATH, 20)
    guest.write(f"{PATH.frontend}/state", "4")
    with pytest.raises(XenbackendError, match=r"the backend's state is Closing after 0\.1 s"):
        detach(toolstack, PATH, 0.1)
    detach(toolstack, PATH, 20, force=True)

    assert [[], []] == [toolstack.directory(each) for each in (PATH.backend, PATH.frontend)]


def test_waiting_for_a_frontend_that_fails(service: str, toolstack: Store, guest: Store) -> None:
    """If a frontend's keys are invalid, waiting for it ends with the reason, and not with a time-out."""
    attach(toolstack, Attachment(PATH, "null:1G"), service)
    guest.write(f"{PATH.frontend}/state", "3")
    with pytest.raises(XenbackendError, match=r"the backend's state is Closed \(22 the frontend has not written"):
        wait_until_connected(toolstack, PATH, 20)


class Device(PosixPath):
    """A device that exists from the third look on."""

    looks = 0

    def is_block_device(self) -> bool:
        """Count the looks."""
        self.looks += 1
        return self.looks > 2


def test_a_device_of_our_own_is_waited_for() -> None:
    """`attach` to the own domain waits for the device, which the kernel makes some time after Connected."""
    device, pauses = Device("/dev/xvdq"), []
    wait_until_there(device, 20, pauses.append)

    assert (3, 2) == (device.looks, len(pauses))


def test_a_device_that_never_comes_is_an_error(tmp_path: Path) -> None:
    """If the device does not appear, the error names it and where the kernel says why."""
    with pytest.raises(XenbackendError, match=r"no .*xvdq after 0 s; see dmesg"):
        wait_until_there(tmp_path / "xvdq", 0)
