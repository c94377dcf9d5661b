"""`xenbackend demo --keep [N]`: a simulated host with guests that stays, to play with.

Must not do what commands do: people play with the commands themselves, by the two variables that are printed.

One thread runs all guests, and never waits for one of them: a paused disk does not keep other guests waiting.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from xenbackend.cli import demo_image, output
from xenbackend.errors import ConfigError, XenbackendError, printable
from xenbackend.protocol.client import SOCKET_VARIABLE
from xenbackend.supervisor.xenstore.toolstack import vbd_path

if TYPE_CHECKING:
    from xenbackend.embedded.machine import GuestDomain, Machine
    from xenbackend.rig.frontend import Frontend

FIRST_DOMID = 5  # as in the manual's examples
MOST = 64
NUMBER = "{n}"  # in a chain: the guest's number
STORE_VARIABLE = "XENSTORED_PATH"  # the same as libxenstore's
_PAGES = 4096  # of a guest's memory
_TICK_S = 0.05
_LOOK_S = 0.5  # between two looks for disks to take or to give back
_DEPTH = 4  # requests of a guest at a time
_SECTORS = 8
_CLOSE_S = 2.0
_CLOSING, _CLOSED = 5, 6  # io/xenbus.h


def run(args: argparse.Namespace, machine: Machine, stack: ExitStack) -> int:
    """Have guests use their disks until Ctrl-C, SIGTERM, or the service's end. Raises: XenbackendError."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xenbackend-images-")))
    end = _End()
    guests: list[_Guest] = []
    try:
        for number in range(1, args.keep + 1):
            chain = chain_of(args.chain, number, directory, args.area)
            guest = _Guest(machine, FIRST_DOMID + number - 1, "guest" if number == 1 else f"guest{number}", number)
            guests.append(guest)
            machine.attach(guest.domid, "xvda", chain)
            guest.look()
        _tell(args, machine, guests)
        next_look = time.monotonic()
        while not end.has_come:
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_S
                if not _has_service(machine):
                    print("the service has ended, so the simulated host ends", file=sys.stderr)
                    break
                for guest in guests:
                    guest.look()
            for guest in guests:
                guest.work()
            time.sleep(_TICK_S)
    finally:
        for guest in guests:
            guest.close(in_order=_has_service(machine))
    return 0


def chain_of(chain: str | None, number: int, directory: Path, size: int) -> str:
    """Return the chain of a guest: `chain` with its number, or over an image of its own, which is made."""
    if chain is not None:
        return chain.replace(NUMBER, str(number))
    image = directory / f"guest{number}.raw"
    demo_image.make(image, size)
    return f"log:|aio:{image}"


def check(args: argparse.Namespace) -> None:
    """Check that there can be so many guests. Raises: ConfigError."""
    if not 1 <= args.keep <= MOST:
        raise ConfigError(f"--keep {args.keep}: from 1 to {MOST} guests")
    if args.chain and args.keep > 1 and NUMBER not in args.chain:
        raise ConfigError(f"--keep {args.keep}: each guest has its own disk; write {NUMBER} where its number belongs")


def _tell(args: argparse.Namespace, machine: Machine, guests: list[_Guest]) -> None:
    store = str(machine.directory / "xenstore.sock")
    disks = [{"vbd": f"{each.domid}/xvda", "guest": each.name} for each in guests]
    if args.json:
        output.print_json({"socket": machine.control, "store": store, "vbds": disks})
    else:
        print("\n".join([f"export {SOCKET_VARIABLE}={machine.control}", f"export {STORE_VARIABLE}={store}", *_path()]))
        names = ", ".join(f"{each['vbd']} ({each['guest']})" for each in disks)
        print(
            f"A simulated host runs until Ctrl-C. Paste the lines above into another terminal; then for example:\n"
            f"    xenbackend status\n    xenbackend top\n    xenbackend pause {disks[0]['vbd']}\nDisks: {names}",
            file=sys.stderr,
        )
    sys.stdout.flush()


def _path() -> list[str]:
    """Return the line by which `xenbackend` is found in another terminal, if a shell would not find this one."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if program.name != "xenbackend" or (found and Path(found).resolve() == program.resolve()):
        return []
    return [f"export PATH={shlex.quote(str(program.parent.absolute()))}:$PATH"]


def _has_service(machine: Machine) -> bool:
    return machine.service is not None and machine.service.poll() is None


class _End:
    """Notes by `has_come` that a signal told us to end."""

    def __init__(self) -> None:
        self.has_come = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, _number: int, _frame: object) -> None:
        self.has_come = True


class _Guest:
    """A guest that uses all disks it has, a little."""

    def __init__(self, machine: Machine, domid: int, name: str, seed: int) -> None:
        self.domid = domid
        self.name = name
        self._machine = machine
        self._domain: GuestDomain = machine.create_guest(domid, _PAGES)
        machine.store.write(f"/local/domain/{domid}/name", name)
        self._disks: dict[str, Frontend] = {}
        self._random = Random(seed)

    def look(self) -> None:
        """Connect disks that have come, and give back those that are to go."""
        from xenbackend.rig.frontend import Frontend, Wishes
        from xenbackend.rig.guest_ring import BackendMisbehaved

        home = f"/local/domain/{self.domid}/device/vbd"
        for device, frontend in list(self._disks.items()):
            if frontend.backend_state() in (0, _CLOSING, _CLOSED):
                del self._disks[device]
                _give_back(frontend)
        for device in self._domain.store.directory(home):
            if device not in self._disks and self._domain.store.read_optional(f"{home}/{device}/state") == "1":
                with suppress(TimeoutError, BackendMisbehaved, XenbackendError):  # it is tried again
                    wishes = Wishes(persistent=True, queues=1, indirect=32)
                    frontend = Frontend(self._domain.memory, self._domain.store, f"{home}/{device}", wishes)
                    frontend.connect()
                    self._disks[device] = frontend

    def work(self) -> None:
        """Read and write a little, if the last requests are done."""
        from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE
        from xenbackend.rig.guest_ring import BackendMisbehaved

        for device, frontend in list(self._disks.items()):
            try:
                frontend.poll()
                facts = frontend.facts
                while sum(ring.in_flight() for ring in frontend.rings) < _DEPTH and self._random.random() < 0.5:
                    sector = self._random.randrange(max(1, facts.sectors // _SECTORS)) * _SECTORS
                    if facts.read_only or self._random.random() < 0.7:
                        frontend.submit(BLKIF_OP_READ, sector, _SECTORS)
                    else:
                        frontend.submit(BLKIF_OP_WRITE, sector, data=self._random.randbytes(_SECTORS * 512))
            except BackendMisbehaved as problem:
                print(f"{self.domid}/{device}: {printable(str(problem))}", file=sys.stderr)
                del self._disks[device]
                frontend.crash()

    def close(self, *, in_order: bool) -> None:
        """End the guest; `in_order`: first give back and detach its disks, if that does not take long."""
        for device, frontend in self._disks.items():
            if in_order and _give_back(frontend):
                with suppress(XenbackendError):
                    self._machine.detach(vbd_path(self._machine.store, self.domid, device))
            elif not in_order:
                frontend.crash()
        self._disks = {}
        self._domain.close()


def _give_back(frontend: Frontend) -> bool:
    """Close a disk, by force if that takes too long; return whether it took no force."""
    from xenbackend.rig.guest_ring import BackendMisbehaved

    try:
        frontend.close(_CLOSE_S)
    except (TimeoutError, BackendMisbehaved, XenbackendError):  # paused, or no service: end as a destroyed guest does
        frontend.crash()
        return False
    return True
