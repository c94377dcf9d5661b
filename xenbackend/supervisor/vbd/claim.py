"""Takes a vbd away from the kernel's own block backend, so that nobody but us maps its rings.

Must not run before the toolstack has seen InitWait: a toolstack that still waits takes a missing directory for a
failure.

Linux makes a device on its xen-backend bus for each backend directory that it finds in state Initialising. Whenever
xen-blkback is loaded, even much later, it binds to the devices of kind ``vbd``. Once the frontend is Initialised, it
maps the rings, even if it has no image for the disk. A device leaves the bus for good only if its directory is gone:

    remove the directory -> wait until the device has left the bus -> make it again in InitWait, which the bus ignores

While the directory is away, nobody but us knows its contents. So they are noted first, where the next service finds
them.

In a driver domain only dom0 could make the directory again, so nothing is removed there. A device without a driver does
no harm. If xen-blkback has bound to the device, the claim waits until somebody unloads xen-blkback, or else fails. An
administrator has to keep it from being loaded.

Nothing is unbound through sysfs: that takes the device's lock and waits for the thread that handles xenstore's events,
and this thread waits for the lock if a toolstack removes the same device at that moment.

Source: Linux drivers/xen/xenbus/xenbus_probe.c, `xenbus_probe_node` and `xenbus_dev_changed`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xenbackend.blkif.handshake import XenbusState, parse_state
from xenbackend.errors import StoreError, XenbackendError
from xenbackend.kernel.blkback import BUS
from xenbackend.loop.reactor import Reactor
from xenbackend.supervisor.vbd.notes import Claimed
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath, libxl_path
from xenbackend.supervisor.xenstore.store import Store

TIMEOUT_S = 10.0
RETRY_S = 1.0  # after xenstore refused something
_ADVICE = "see in dmesg what xen-blkback waits for"
_ADVICE_IN_DOMAIN = (
    "in a driver domain only dom0 can take a disk away from it: keep it from being loaded there, with a line "
    "`install xen-blkback /bin/false` in a file in /etc/modprobe.d, and unload it: modprobe -r xen-blkback"
)
PAUSE_S = 0.002  # between two looks at the bus; its files can be neither watched nor polled


class Bus:
    """The devices that the kernel's block backend has, or would take once it is loaded."""

    def __init__(self, root: Path = Path(BUS)) -> None:
        self._root = root

    def has(self, path: VbdPath) -> bool:
        """Return whether the kernel is in our way. Linux has no backend for kinds other than ``vbd``."""
        device = self._root / name_of(path)
        return path.kind == "vbd" and (device / "driver" if path.backend_domid else device).exists()


def name_of(path: VbdPath) -> str:
    """Return the name of a vbd on the kernel's bus."""
    return f"vbd-{path.frontend_domid}-{path.devid}"


Note = Callable[[Claimed | None], None]


class Claim:
    """The claim of one vbd. Call `step` until it returns True."""

    def __init__(
        self,
        store: Store,
        bus: Bus,
        path: VbdPath,
        now: Callable[[], float],
        note: Note = lambda _: None,
        noted: Claimed | None = None,
    ) -> None:
        """Begin, or go on with the claim that an earlier service `noted`. `note` stores it for the next service."""
        self._store = store
        self._bus = bus
        self._path = path
        self._now = now
        self._deadline = now() + TIMEOUT_S
        self._note = note
        self._noted = noted  # the directory's contents, from when it may be away
        self._is_away = noted is not None

    def step(self) -> bool:
        """Do what can be done now, and return whether the claim is over: the vbd is ours, or the toolstack removed it.

        Raises: StoreError; try again when xenstore is back. XenbackendError, if the kernel keeps the vbd for TIMEOUT_S.
        """
        if not self._path.backend_domid:
            self._is_away = self._store.transact(self._remove)
            if not self._is_away:
                self._note(None)
                return True
        if not self._bus.has(self._path):
            self.give_back()
            return True
        if self._now() >= self._deadline:
            self.give_back()
            raise XenbackendError(
                f"the kernel's block backend did not release {name_of(self._path)} within {TIMEOUT_S:g} s; "
                f"{_ADVICE_IN_DOMAIN if self._path.backend_domid else _ADVICE}"
            )
        return False

    def give_back(self) -> None:
        """Make the directory again if it is away. Raises: StoreError."""
        if self._noted is not None:
            self._store.transact(self._make_again)
        self._note(None)

    def _remove(self, nodes: Nodes) -> bool:
        """Remove the directory, or what xen-blkback has written there since; return whether the directory is away."""
        backend = self._path.backend
        found = nodes.dictionary(backend)
        if "frontend" not in found:  # not a toolstack's: empty, or written by blkback after the removal
            if found:
                nodes.remove(backend)
            return self._noted is not None
        if self._is_away or found.get("online") != "1" or parse_state(found.get("state")) not in _UNUSED:
            return False
        is_in_libxl = bool(nodes.directory(libxl_path(self._path)))
        self._noted = Claimed(found, nodes.get_permissions(backend), is_in_libxl)
        self._note(self._noted)
        nodes.remove(backend)
        return True

    def _make_again(self, nodes: Nodes) -> None:
        """Make the directory as it was, but in InitWait, unless the toolstack has removed the vbd in the meantime."""
        assert self._noted is not None  # noqa: S101 - the caller has checked
        path = self._path
        is_wanted = nodes.read_optional(f"{path.frontend}/backend") == path.backend
        if self._noted.is_in_libxl and not nodes.directory(libxl_path(path)):
            is_wanted = False
        if not is_wanted or "frontend" in nodes.dictionary(path.backend):
            return
        keys = {**self._noted.keys, "state": str(XenbusState.INIT_WAIT.value)}
        nodes.make(path.backend, keys, self._noted.permissions)


_UNUSED = (XenbusState.INITIALISING, XenbusState.INIT_WAIT)


class Taking:
    """Carries out the claims of one vbd in the loop, one at a time."""

    def __init__(
        self,
        loop: Reactor,
        begin: Callable[[], Claim],
        then: Callable[[XenbackendError | None], object],
        claim: Claim | None = None,
    ) -> None:
        """`begin` makes a claim; `claim` is one that an earlier service had begun.

        `then` is called from the loop when a claim is over: with the error if the kernel kept the vbd, else with None.
        """
        self._loop = loop
        self._begin = begin
        self._then = then
        self._claim = claim
        self._timer = loop.timer(self._step)
        if claim is not None:
            self._timer.set(loop.now())

    @property
    def is_under_way(self) -> bool:
        """True from the beginning of a claim until it is over."""
        return self._claim is not None

    def begin(self) -> None:
        """Begin a claim, unless one is under way."""
        if self._claim is None:
            self._claim = self._begin()
            self._timer.set(self._loop.now())

    def give_back(self) -> None:
        """Make the directory again at once if it is away, because the service ends. Raises: StoreError."""
        claim, self._claim = self._claim, None
        self._timer.set(None)
        if claim is not None:
            claim.give_back()

    def _step(self) -> None:
        if self._claim is None:
            return
        now = self._loop.now()
        problem: XenbackendError | None = None
        self._timer.set(now + RETRY_S)
        try:
            if not self._claim.step():
                self._timer.set(now + PAUSE_S)
                return
        except StoreError:
            return
        except XenbackendError as error:
            problem = error
        self._claim = None
        self._timer.set(None)
        self._then(problem)
