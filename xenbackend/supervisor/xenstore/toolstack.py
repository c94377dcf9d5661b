"""Attaches and detaches a vbd without xl: writes what libxl writes, and waits for the service's answer.

Must not serve, and must not start anything: the service runs elsewhere.

The backend's directory is made in state InitWait, so that the kernel's own blkback, which only takes vbds in state
Initialising, leaves it alone. Then the service is asked to serve it, as a hotplug script asks. The frontend's directory
is made once the chain is open, so a guest never sees a disk that cannot be served. By an entry below ``/libxl``,
``xl block-list``, ``xl block-detach`` and ``xl destroy`` know the vbd. It is not in the domain's configuration, so it
is lost when the domain is saved, migrated or rebooted.

Source of the keys: libxl `device_disk_add`, `libxl__device_generic_add`, `libxl__initiate_device_generic_remove`.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from xenbackend.blkif.handshake import XenbusState, name, parse_state
from xenbackend.block.chain import parse_chain
from xenbackend.disks import DiskName, devid_to_vdev, vdev_to_devid
from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import TICK_S, ServiceError, UnderWay, Unreachable, Waiting, call, give_order
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath, domain_path, libxl_path, parse_backend_path
from xenbackend.supervisor.xenstore.store import Store

CONNECT_TIMEOUT_S = 40.0  # libxl's for a hotplug script
DETACH_TIMEOUT_S = 10.0  # libxl's
_NOTE_S = 2.0  # for the service to enter the order into its ledger
_LOOK_S = 0.01  # between two looks for a device
_SCRIPT = "/etc/xen/scripts/block-xenbackend"
_TOKEN = "toolstack"  # noqa: S105 - a watch's token
_S = XenbusState


@dataclass(frozen=True, slots=True)
class Attachment:
    """A vbd as `attach` makes it."""

    path: VbdPath
    chain: str
    read_only: bool = False

    @property
    def libxl(self) -> str:
        """The directory of libxl's own copy of the backend's keys."""
        return libxl_path(self.path)


def vbd_path(store: Store, domid: int, vdev: str, kind: str = "vbd") -> VbdPath:
    """Return the path of a vbd with dom0 as its backend. Raises: ConfigError, if we are not in dom0; StoreError."""
    return VbdPath(kind, _dom0(store), domid, vdev_to_devid(vdev))


def find_vbd(store: Store, disk: DiskName) -> VbdPath:
    """Return the path of a disk, whose domain may be given by its guest's name. Raises: ConfigError, StoreError."""
    backend_domid, domid = _dom0(store), disk.domid
    if domid is None:
        domids = [int(each) for each in store.directory("/local/domain") if each.isdigit()]
        named = [each for each in domids if store.read_optional(f"{domain_path(each)}/name") == disk.domain]
        if len(named) != 1:  # two of one name are possible while a guest is migrated within its host
            raise ConfigError(f"there {'are several guests' if named else 'is no guest'} {disk.domain!r}; see: xl list")
        domid = named[0]
    return VbdPath(disk.kind or "vbd", backend_domid, domid, disk.devid)


def _dom0(store: Store) -> int:
    """Return the number of our own domain. Raises: ConfigError, if it is not dom0, which alone makes guests' nodes."""
    domid = store.own_domid()
    if domid:
        raise ConfigError(
            f"this is domain {domid}, and only dom0 can attach and detach disks, also those of a driver domain; run "
            "there: xl block-attach GUEST 'script=block-xenbackend,backend=NAME,vdev=xvdb,target=CHAIN'"
        )
    return domid


def find_attached(store: Store, disk: DiskName) -> VbdPath:
    """Return the path of a disk that a toolstack has attached, with its actual kind. Raises: as `find_vbd`."""
    path = find_vbd(store, disk)
    if disk.kind:
        return path
    known = parse_backend_path(store.read_optional(f"{libxl_path(path)}/backend") or "", path.backend_domid)
    return known[0] if known is not None and replace(known[0], kind=path.kind) == path else path


def attach(
    store: Store,
    wanted: Attachment,
    service: str,
    timeout_s: float | None = None,
    patience_s: float = DETACH_TIMEOUT_S,
    waiting: Waiting | None = None,
) -> Answer:
    """Attach a vbd, and return the service's answer when its chain is open and the frontend has been told.

    Args:
        store: the connection.
        wanted: the vbd.
        service: the control socket of the service.
        timeout_s: how long to wait for the chain to be open, None for as long as it takes. When the time is up, the
            service goes on: the guest gets the disk once it is open.
        patience_s: how long to wait for the service to close a vbd that could not be opened.
        waiting: called now and then while the chain is opened.

    Raises: before anything is touched, ChainError, ServiceError if no service answers, and ConfigError if there is no
    such domain or the disk is there already. Afterwards ServiceError with the service's sentence; everything is then
    removed again unless its code is UNDER_WAY.
    """
    parse_chain(wanted.chain)
    store.transact(lambda nodes: _check_place(nodes, wanted))
    call(service, {"verb": "ping"})
    store.transact(lambda nodes: _write_backend(nodes, wanted))
    try:
        answer = _have_served(service, wanted, timeout_s, waiting)
    except BaseException as problem:
        if isinstance(problem, ServiceError) and problem.answer.code is Code.UNDER_WAY:
            store.transact(lambda nodes: _write_frontend(nodes, wanted))
        else:
            _withdraw(store, wanted.path, patience_s)
        raise
    store.transact(lambda nodes: _write_frontend(nodes, wanted))
    return answer


def _have_served(service: str, wanted: Attachment, timeout_s: float | None, waiting: Waiting | None) -> Answer:
    """Have the service open the chain, and return its answer. Raises: ServiceError.

    A service that is being replaced may end before it answers. Unless the time is limited, the next one is then asked,
    which knows the order by its token.
    """
    token = os.urandom(8).hex()
    path, what = wanted.path.backend, f"{wanted.path.disk}: attach"
    request = {"verb": "hotplug", "action": "add", "path": path, "chain": wanted.chain, "token": token}
    try:
        return give_order(service, request, what, timeout_s, waiting)
    except UnderWay as problem:
        if timeout_s is not None or problem.order is not None:
            raise
        try:
            return give_order(service, request, what, None, waiting)
        except Unreachable:
            raise problem from None


def wait_until_connected(store: Store, path: VbdPath, timeout_s: float) -> None:
    """Return when the frontend is served. Raises: XenbackendError."""
    node = f"{path.backend}/state"
    last = _wait_for(store, node, lambda state: parse_state(state) in (_S.UNKNOWN, _S.CONNECTED, _S.CLOSED), timeout_s)
    state = parse_state(last)
    if state is not _S.CONNECTED:
        error = store.read_optional(f"{domain_path(path.backend_domid)}/error/backend/{path}/error")
        hint = (
            "the guest's blkfront has not answered; in Linux: modprobe xen-blkfront" if state is _S.INIT_WAIT else error
        )
        raise XenbackendError(
            f"{path.disk} is not connected: the backend's state is {name(state)}{f' ({hint})' if hint else ''}"
        )


def wait_until_there(device: Path, timeout_s: float, pause: Callable[[float], object] | None = None) -> None:
    """Return when our own kernel has made the block device of a connected disk, which takes a moment.

    Raises: XenbackendError.
    """
    deadline = time.monotonic() + timeout_s
    while not device.is_block_device():
        if time.monotonic() >= deadline:
            raise XenbackendError(f"the disk is connected, but there is no {device} after {timeout_s:g} s; see dmesg")
        (pause or _pause)(_LOOK_S)


def detach(
    store: Store,
    path: VbdPath,
    timeout_s: float = DETACH_TIMEOUT_S,
    *,
    force: bool = False,
    waiting: Waiting | None = None,
    service: str = "",
) -> None:
    """Ask both ends to close a vbd, wait until they have, and remove its directories.

    Args:
        store: the connection.
        path: the vbd.
        timeout_s: how long to wait for the backend to say Closed.
        force: remove the frontend's directory first, even if the guest still uses the disk.
        waiting: called now and then.
        service: the control socket of the service, which enters the order into its ledger if it can; empty: none.

    Raises: ConfigError when there is no such vbd; ServiceError with code UNDER_WAY when it is still in use and `force`
    is not given.
    """
    store.transact(lambda nodes: _request_removal(nodes, path, force=force))
    number = _note_detach(service, path) if service else None
    node = f"{path.backend}/state"
    ended = (_S.UNKNOWN, _S.CLOSED)
    state = parse_state(_wait_for(store, node, lambda state: parse_state(state) in ended, timeout_s, waiting))
    if state not in ended and not force:
        sentence = (
            f"{path.disk}: detach is still under way, the backend's state is {name(state)} after {timeout_s:g} s: the "
            "guest uses the disk, or no service runs; run the same command again to continue, or with --force to "
            "take the disk away all the same"
        )
        raise ServiceError(Answer(Code.UNDER_WAY, sentence=sentence, order=number))
    store.transact(lambda nodes: _remove(nodes, path))


def _note_detach(service: str, path: VbdPath) -> int | None:
    """Enter the order into the service's ledger, and return its number; None if the service does not take it."""
    try:
        answer = call(service, {"verb": "detach", "vbd": path.disk, "wait": 0}, _NOTE_S)
    except ServiceError as problem:  # the order is still under way, of course
        answer = problem.answer
    return answer.order


def _backend_keys(wanted: Attachment) -> dict[str, str]:
    path = wanted.path
    return {
        "frontend": path.frontend,
        "params": wanted.chain,
        "script": _SCRIPT,
        "frontend-id": str(path.frontend_domid),
        "online": "1",
        "removable": "0",
        "bootable": "1",
        "dev": devid_to_vdev(path.devid),
        "type": "phy",
        "mode": "r" if wanted.read_only else "w",
        "device-type": "disk",
        "discard-enable": "1",
        "specification": "xen",
        "state": str(_S.INIT_WAIT.value),
    }


def _check_place(nodes: Nodes, wanted: Attachment) -> None:
    path = wanted.path
    if not nodes.directory(domain_path(path.frontend_domid)):
        raise ConfigError(f"there is no domain {path.frontend_domid}; xl list shows them")
    for taken in (path.backend, path.frontend, wanted.libxl):
        if nodes.directory(taken):
            raise ConfigError(f"there is already a disk {path.disk} ({taken})")


def _write_backend(nodes: Nodes, wanted: Attachment) -> None:
    path = wanted.path
    _check_place(nodes, wanted)
    keys = _backend_keys(wanted)
    nodes.make(path.backend, keys, [f"n{path.backend_domid}", f"r{path.frontend_domid}"])
    nodes.make(wanted.libxl, {**keys, "backend": path.backend}, ["n0"])


def _write_frontend(nodes: Nodes, wanted: Attachment) -> None:
    path = wanted.path
    keys = {
        "backend": path.backend,
        "backend-id": str(path.backend_domid),
        "virtual-device": str(path.devid),
        "device-type": "disk",
        "trusted": "1",
        "state": str(_S.INITIALISING.value),
    }
    nodes.make(path.frontend, keys, [f"n{path.frontend_domid}", f"r{path.backend_domid}"])


def _withdraw(store: Store, path: VbdPath, patience_s: float) -> None:
    """Undo an attachment that failed."""
    store.transact(lambda nodes: _request_removal(nodes, path, force=True))
    _wait_for(store, f"{path.backend}/state", lambda state: parse_state(state) is _S.CLOSED, patience_s)
    store.transact(lambda nodes: _remove(nodes, path))


def _request_removal(nodes: Nodes, path: VbdPath, *, force: bool) -> None:
    state = nodes.read_optional(f"{path.backend}/state")
    if state is None:
        raise ConfigError(f"xenbackend serves no disk {path.disk}; see: xenbackend status")
    if force:
        nodes.remove(path.frontend)
    nodes.write(f"{path.backend}/online", "0")
    if parse_state(state) is not _S.CLOSED:
        nodes.write(f"{path.backend}/state", str(_S.CLOSING.value))


def _remove(nodes: Nodes, path: VbdPath) -> None:
    """Remove the vbd's three directories, and those above them that are left empty."""
    nodes.prune(path.frontend, domain_path(path.frontend_domid))
    nodes.prune(path.backend, domain_path(path.backend_domid))
    nodes.prune(libxl_path(path), f"/libxl/{path.frontend_domid}")


def _pause(seconds: float) -> None:
    select.select([], [], [], seconds)


def _wait_for(
    store: Store,
    node: str,
    is_enough: Callable[[str | None], bool],
    timeout_s: float,
    waiting: Waiting | None = None,
) -> str | None:
    """Wait until `is_enough` accepts the node's value, or the time is up, and return the last value seen."""
    begun = time.monotonic()
    deadline = begun + timeout_s
    store.watch(node, _TOKEN)
    try:
        while not is_enough(value := store.read_optional(node)):
            while not store.events():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return value
                if not select.select([store.fileno()], [], [], min(left_s, TICK_S))[0] and waiting is not None:
                    waiting(time.monotonic() - begun)
        return value
    finally:
        store.unwatch(node, _TOKEN)
