"""A service in a driver domain, which may read and write far less of xenstore than dom0: fake workers, real vbds.

The domains' directories are as libxl makes them, and the tests do what `xl devd` does. The real ones are in
tests/xen/test_driver_domain.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.supervisor.helpers import Stepped, offer_ring, remove_like_libxl, write_like_libxl
from xenbackend.blkif.handshake import XenbusState
from xenbackend.disks import parse_disk
from xenbackend.errors import ConfigError, StoreError, XenbackendError
from xenbackend.rig.store import Xenstored
from xenbackend.rig.tree import Quota
from xenbackend.supervisor.service.brake import BURST
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.claim import TIMEOUT_S, Bus, Claim
from xenbackend.supervisor.vbd.phase import Phase
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes, forget_notes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store
from xenbackend.supervisor.xenstore.toolstack import find_vbd, vbd_path

PATH = VbdPath("vbd", 2, 5, 51712)
HOME = "/local/domain/2"
S = XenbusState


def introduce(xenstored: Xenstored, toolstack: Store, domid: int) -> str:
    """Make a domain as libxl does, with the directories that it may write to; return its socket.

    Source: libxl `libxl__domain_make`.
    """
    socket = xenstored.add_domain_socket(domid)
    home = f"/local/domain/{domid}"
    for name in ("data", "error"):
        toolstack.mkdir(f"{home}/{name}")
        toolstack.set_permissions(f"{home}/{name}", [f"n{domid}"])
    toolstack.mkdir(f"{home}/device")
    toolstack.write(f"{home}/name", f"guest{domid}")
    for name in ("device", "name"):
        toolstack.set_permissions(f"{home}/{name}", ["n0", f"r{domid}"])
    return socket


@pytest.fixture
def address(xenstored: Xenstored, toolstack: Store) -> str:
    """Where domain 2 finds its xenstore; there is a guest 5, too."""
    introduce(xenstored, toolstack, 5)
    return introduce(xenstored, toolstack, 2)


@pytest.fixture
def devd(address: str) -> Iterator[Store]:
    """A connection of domain 2, as `xl devd` has."""
    with Store(address) as store:
        yield store


@pytest.fixture
def driver(address: str) -> Iterator[Stepped]:
    """A registry in domain 2; `xl devd` runs the script there, once it sees InitWait."""
    stepped = Stepped(address, Settings())
    yield stepped
    stepped.close()


def _has(store: Store, key: str, value: str, path: VbdPath = PATH) -> Callable[[], bool]:
    return lambda: store.read_optional(f"{path.backend}/{key}") == value


def _serve(driver: Stepped, toolstack: Store, guest: Store, path: VbdPath = PATH) -> None:
    write_like_libxl(toolstack, path)
    driver.until(_has(toolstack, "hotplug-status", "connected", path))
    offer_ring(guest, path)
    driver.until(_has(toolstack, "state", "4", path))


@pytest.mark.slow
def test_birth_service_and_removal(driver: Stepped, toolstack: Store, devd: Store, guest: Store) -> None:
    """A disk in a driver domain is served like one in dom0. Its status is written where the domain may write, readable
    for the domain and the toolstack only, and is removed with the disk; directories that libxl has made stay.
    """
    _serve(driver, toolstack, guest)
    shown = toolstack.dictionary(f"{HOME}/data/xenbackend/{PATH}")
    for place in ("", f"/{PATH}/chain"):
        with pytest.raises(StoreError, match="Permission denied"):
            guest.read(f"{HOME}/data/xenbackend{place}")
    guest.write(f"{PATH.frontend}/state", "4")
    remove_like_libxl(toolstack, PATH)
    driver.until(_has(toolstack, "state", "5"))
    guest.write(f"{PATH.frontend}/state", "6")
    driver.until(_has(toolstack, "state", "6"))
    devd.remove(PATH.backend)
    driver.until(lambda: not driver.registry.vbds)

    assert ("null:1G", "serving") == (shown["chain"], shown["phase"])
    assert [] == toolstack.directory(f"{HOME}/data/xenbackend/vbd")
    assert ["n2"] == toolstack.get_permissions(f"{HOME}/data") == toolstack.get_permissions(f"{HOME}/error")


@pytest.mark.slow
@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_a_guest_that_has_gone(driver: Stepped, toolstack: Store, guest: Store, lines: io.StringIO) -> None:
    """If a guest is destroyed, the nodes that we may read go with it: its disk is closed without a warning, and the
    toolstack need not wait.
    """
    _serve(driver, toolstack, guest)
    toolstack.remove("/local/domain/5")
    remove_like_libxl(toolstack, PATH)
    driver.until(_has(toolstack, "state", "6"))

    assert "warning" not in lines.getvalue()


@pytest.mark.slow
def test_a_chain_that_cannot_be_opened(driver: Stepped, toolstack: Store) -> None:
    """An error is shown where Linux' own drivers show theirs, each time anew."""
    for _ in range(2):
        write_like_libxl(toolstack, PATH, params="null:2G")
        driver.until(lambda: toolstack.read_optional(f"{HOME}/error/backend/{PATH}/error"))
        driver.until(lambda: not driver.registry.vbds[PATH].worker)
        assert "22 null: it is broken" == toolstack.read(f"{HOME}/error/backend/{PATH}/error")
        remove_like_libxl(toolstack, PATH)
        driver.until(_has(toolstack, "state", "6"))
        toolstack.remove(PATH.backend)
        driver.until(lambda: not driver.registry.vbds)

    assert [] == toolstack.directory(f"{HOME}/error")


def test_notes_of_a_former_service(toolstack: Store, devd: Store) -> None:
    """The files of a disk are noted where the domain may write, for the next service; the notes of a disk that is gone
    are removed.
    """
    write_like_libxl(toolstack, PATH, state="4")
    VbdNodes(devd, PATH).note_files("null:1G", {"/img": "file device=1 inode=2"})
    keys = toolstack.dictionary(PATH.backend)
    forget_notes(devd, 2)
    found = VbdNodes(devd, PATH).noted_files(keys, "null:1G")
    toolstack.remove(PATH.backend)
    forget_notes(devd, 2)

    assert {"/img": "file device=1 inode=2"} == found
    assert [] == toolstack.directory(f"{HOME}/data")


@pytest.mark.parametrize(
    ("ours", "expected"), [(S.INITIALISING, True), (S.INIT_WAIT, True), (S.CONNECTED, False), (S.CLOSING, False)]
)
def test_any_guest_may_be_one_that_is_brought(devd: Store, ours: XenbusState, *, expected: bool) -> None:
    """A driver domain may not read a guest's name, which would tell of a migration: until the guest has connected, it
    may still be writing to the image elsewhere.
    """
    assert expected is VbdNodes(devd, PATH).may_be_incoming(ours)


@pytest.mark.slow
@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_guests_have_no_names_there(driver: Stepped, toolstack: Store, guest: Store, lines: io.StringIO) -> None:
    """In a driver domain a disk is found by its guest's number, and not by its name."""
    _serve(driver, toolstack, guest)

    assert PATH == driver.registry.find("5/xvda").path
    assert {} == driver.registry.names_of([5])
    with pytest.raises(ConfigError, match="guest5/xvda"):
        driver.registry.find("guest5/xvda")


def test_attaching_is_for_dom0(devd: Store) -> None:
    """In a driver domain `attach` and `detach` say who can do that, and how, before they change anything."""
    for find in (lambda: vbd_path(devd, 5, "xvdb"), lambda: find_vbd(devd, parse_disk("guest5/xvdb"))):
        with pytest.raises(ConfigError, match=r"this is domain 2, and only dom0 can attach .* xl block-attach"):
            find()


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    """The kernel's bus, on which there is a device for the vbd, without a driver."""
    (tmp_path / "bus/vbd-5-51712").mkdir(parents=True)
    return Bus(tmp_path / "bus")


def test_a_device_without_a_driver_is_in_nobodys_way(bus: Bus, tmp_path: Path) -> None:
    """In dom0 each device is taken off the bus, as a driver may be loaded later; in a driver domain, where that is not
    possible, only a device with a driver matters.
    """
    assert (True, False) == (bus.has(VbdPath("vbd", 0, 5, 51712)), bus.has(PATH))
    (tmp_path / "bus/vbd-5-51712/driver").touch()

    assert bus.has(PATH)


def test_a_device_of_blkback_is_waited_for(bus: Bus, tmp_path: Path, toolstack: Store, devd: Store) -> None:
    """In a driver domain nothing is removed, as it could not be made again: if xen-blkback has a disk, the claim ends
    once somebody has unloaded that driver, or fails after a while with advice how to.
    """
    driver = tmp_path / "bus/vbd-5-51712/driver"
    driver.touch()
    write_like_libxl(toolstack, PATH)
    before, times = toolstack.dictionary(PATH.backend), iter([0.0, 1.0, TIMEOUT_S + 1, 0.0, 1.0])
    claim = Claim(devd, bus, PATH, lambda: next(times))
    assert not claim.step()
    with pytest.raises(XenbackendError, match=r"release vbd-5-51712 .*: modprobe -r xen-blkback"):
        claim.step()
    claim = Claim(devd, bus, PATH, lambda: next(times))
    assert not claim.step()
    driver.unlink()

    assert claim.step()
    assert before == toolstack.dictionary(PATH.backend)


@pytest.mark.slow
@pytest.mark.rows("C11")
@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_the_quota_of_nodes(tmp_path: Path, lines: io.StringIO) -> None:
    """C11: a disk for whose keys xenstore has no room is not served until there is room; disks in service are not
    affected.
    """
    other = VbdPath("vbd", 2, 6, 51712)
    with (
        Xenstored(tmp_path / "small", quota=Quota(nodes=42)) as xenstored,
        Store(xenstored.address) as toolstack,
        Store(introduce(xenstored, toolstack, 5)) as guest,
        closing(Stepped(introduce(xenstored, toolstack, 2), Settings())) as driver,
    ):
        introduce(xenstored, toolstack, 6)
        _serve(driver, toolstack, guest)
        write_like_libxl(toolstack, other)
        driver.until(lambda: "quota for this domain" in lines.getvalue())
        refused = toolstack.read(f"{other.backend}/state")
        served = driver.registry.vbds[PATH]
        former = served.worker
        former.kill("the test wants another one")
        driver.until(lambda: served.worker not in (None, former) and served.device.phase is Phase.SERVING)
        remove_like_libxl(toolstack, PATH)
        toolstack.remove(PATH.frontend)
        driver.until(_has(toolstack, "state", "6"))
        toolstack.remove(PATH.backend)
        driver.until(lambda: "connected" == toolstack.read_optional(f"{other.backend}/hotplug-status"))

    assert "1" == refused


@pytest.mark.slow
@pytest.mark.rows("C11")
@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_the_quota_of_watches(tmp_path: Path, lines: io.StringIO) -> None:
    """C11: a disk whose frontend xenstore refuses to watch is served all the same: it is looked at now and then, the
    log says once what to do, and the watch is set as soon as there is room. A watch that was removed because its guest
    writes too often may find its place taken, and then the same holds for its disk.
    """
    first, other = PATH, VbdPath("vbd", 2, 6, 51712)
    with (
        Xenstored(tmp_path / "small", quota=Quota(watches=len(Settings().kinds) + 1)) as xenstored,
        Store(xenstored.address) as toolstack,
        Store(introduce(xenstored, toolstack, 5)) as guest,
        Store(introduce(xenstored, toolstack, 6)) as another,
        closing(Stepped(introduce(xenstored, toolstack, 2), Settings())) as driver,
    ):
        served = [(first, guest), (other, another)]
        for path, frontend in served:
            _serve(driver, toolstack, frontend, path)
        nodes = [driver.registry.vbds[path]._nodes for path, _ in served]
        unwatched = [[each.is_unwatched for each in nodes]]
        for number in range(2 * BURST):
            guest.write(f"{first.frontend}/state", "4" if number % 2 else "3")
        driver.until(lambda: nodes[0].is_unwatched and not nodes[1].is_unwatched)
        for path, frontend in served:
            frontend.write(f"{path.frontend}/state", "6")
            driver.until(_has(toolstack, "state", "6", path))
        unwatched.append([each.is_unwatched for each in nodes])
        toolstack.remove(other.frontend)
        remove_like_libxl(toolstack, other)
        driver.until(_has(toolstack, "state", "6", other))
        toolstack.remove(other.backend)
        driver.until(lambda: list(driver.registry.vbds) == [first] and not nodes[0].is_unwatched)

    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    said = [each["vbd"] for each in written if "quota set watches" in each["event"]]
    assert ([[False, True], [True, False]], ["6/xvda", "5/xvda"]) == (unwatched, said)
