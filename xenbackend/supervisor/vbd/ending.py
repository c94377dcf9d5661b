"""Saves what must not be lost of a vbd when its service forgets it: which chain has the guest's data, in which files.

Must not forget anything itself, nor keep a service that is being replaced from ending.

During an exchange, and until xenstore names the chain in service, a file (`last_chains`) tells the next service,
whenever this one ends. A service that stops closes its worker and then waits for xenstore; one that is replaced waits
for the end of the exchange (`service.main`). If that takes too long, the file is left. If the file says that an
exchange was under way, and nothing else was left, the disk waits for an administrator.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from xenbackend.errors import KernelError, StoreError
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.events import Stop
from xenbackend.supervisor.vbd.last_chains import LastChain
from xenbackend.supervisor.vbd.vbd_log import LOST, UNFINISHED, UNTOLD, VbdLog
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes

if TYPE_CHECKING:
    from xenbackend.supervisor.vbd.vbd import Vbd

WAIT_S = 45.0  # from the stop on; the unit's TimeoutStopSec is longer
_WAITS = "xenstore must still be told which chain is in service; the service waits for that before it ends"
_LEFT = "xenstore could not be told which chain was in service; it is in a file for the next service"
_LEFT_UNDECIDED = "the chain was still being exchanged when the service ended; a file records both for the next service"
_DOUBT = (
    "the service ended while {next} was replacing {chain}, and it is not known which of the two has the guest's last "
    "writes; find out, then `xenbackend set --replace {disk} CHAIN` serves the disk from that one"
)


class Ending:
    """What one vbd leaves when its service ends, and what it finds of an earlier one."""

    def __init__(self, vbd: Vbd, context: Context, nodes: VbdNodes, log: VbdLog) -> None:
        self._vbd = vbd
        self._context = context
        self._nodes = nodes
        self._log = log
        self._give_up_at = 0.0
        self._has_said = False
        self._has_recalled = False
        self._said: LastChain | None = None  # what the file says
        self._timer = context.loop.timer(self._give_up)

    def find(self, *, is_heir: bool) -> bool:
        """Go on with what an earlier service left in a file, and return whether an earlier service left anything.

        `is_heir`: it has left descriptors, with notes.
        """
        self._has_recalled = is_heir
        handover, last = self._vbd.handover, self._context.last_chains.of(self._vbd.path)
        handover.on_note = self._tell_next
        if last is not None and not handover.notes.chain:  # else the notes were left, too, and are more exact
            handover.note(chain=last.chain, stale_params=last.stale_params, undecided=last.next_chain)
        self._tell_next(is_new=True)
        return is_heir or last is not None

    @property
    def doubt(self) -> str:
        """Why nobody knows which chain has the guest's data, for the administrator who has to decide; else empty."""
        notes = self._vbd.handover.notes
        if not notes.undecided:
            return ""
        return _DOUBT.format(next=notes.undecided, chain=notes.chain, disk=self._vbd.path.disk)

    @property
    def waits_for(self) -> str:
        """What a service that stops still waits for before it can forget the disk, for people."""
        if self._vbd.orders.is_exchanging():
            return "its chain, which is being exchanged"
        if self._vbd.worker is not None:
            return "its worker, which finishes the requests in flight and closes the disk"
        if self._vbd.handover.notes.stale_params:
            return f"xenstore, which must be told that {self._vbd.chain_in_service()} is in service"
        return "another worker, which completes what a dead one had begun"

    def saw(self, keys: Mapping[str, str]) -> None:
        """Take note of the backend's keys, and at the first call of the files that are noted in xenstore."""
        handover = self._vbd.handover
        if handover.notes.stale_params:
            handover.saw_params(keys.get("params", ""))
        if not self._has_recalled:  # else the notes that were left have them
            chain = handover.notes.chain or keys.get("params", "")
            handover.expect(chain, self._nodes.noted_files(keys, chain))
            self._has_recalled = True

    def begin(self) -> None:
        """Begin the time for which a service that stops waits."""
        self._give_up_at = self._context.loop.now() + WAIT_S
        self._timer.set(self._give_up_at)

    def may_end(self) -> bool:
        """Return whether the vbd may be forgotten now; if not, it is asked again after the next event."""
        if self._vbd.device.is_leaving or self._is_told():
            return True
        is_late = self._context.loop.now() >= self._give_up_at
        if not is_late and not self._has_said:
            self._has_said = True
            self._log.say("warning", _WAITS, chain=self._vbd.chain_in_service(), seconds=f"{WAIT_S:.0f}")
        return is_late

    def end(self) -> None:
        """Leave a file if one is needed, even if the notes are kept: the next service may not get them."""
        self._timer.set(None)
        device, handover, chain = self._vbd.device, self._vbd.handover, self._vbd.chain_in_service()
        handover.on_note = lambda: None  # the next service need not know what is dropped from here on
        if not device.is_leaving and handover.agreed() is not None and self._is_waited_for():
            self._log.say("critical", UNFINISHED)
        if not device.is_leaving and not device.sight.is_over and handover.files.has_unnamed():
            self._log.say("critical", LOST)
        last = self._last()
        if device.sight.is_over or last is None:
            self._context.last_chains.forget(self._vbd.path)
            return
        chains = {"chain": chain, "next_chain": last.next_chain} if last.next_chain else {"chain": chain}
        try:
            file = self._context.last_chains.leave(self._vbd.path, last)
        except KernelError as error:
            self._log.say("critical", UNTOLD, **chains, reason=str(error))
        else:
            self._log.say("warning", _LEFT_UNDECIDED if last.next_chain else _LEFT, **chains, file=str(file))

    def _is_waited_for(self) -> bool:
        """Return whether a guest has rings that we serve, and has not gone since the last look."""
        if not self._vbd.device.is_waited_for():
            return False
        try:
            return self._nodes.read_frontend("state") is not None
        except StoreError:
            return True

    def _give_up(self) -> None:
        """Give up unfinished work if xenstore is away, without which it cannot be done; else look again."""
        if self._context.store.is_connected:
            self._timer.set(self._context.loop.now() + WAIT_S)
            self._vbd.look_soon(node=True)
        else:
            self._vbd.handle(Stop(self._vbd.device.is_leaving))

    def _last(self) -> LastChain | None:
        """Return what the next service has to know, None if xenstore tells it."""
        notes = self._vbd.handover.notes
        exchanged = notes.exchange.chain if notes.exchange and notes.exchange.chain != notes.chain else ""
        last = LastChain(notes.chain, notes.stale_params, exchanged or notes.undecided)
        return last if last.stale_params or last.next_chain else None

    def _tell_next(self, *, is_new: bool = False) -> None:
        """Bring the file up to date with the notes."""
        last, chains = self._last(), self._context.last_chains
        if last != self._said or is_new:
            self._said = last
            if last is None:
                chains.forget(self._vbd.path)
            else:
                with suppress(KernelError):  # `end` tries again, and logs the error
                    chains.leave(self._vbd.path, last)
        chains.on_change()

    def _is_told(self) -> bool:
        if not self._vbd.handover.notes.stale_params or self._vbd.device.sight.is_over:
            return True
        try:
            keys = self._nodes.keys()
        except StoreError:
            return False
        if keys is not None:  # else a look will tell that the vbd is over
            self.saw(keys)
        return keys is None or not self._vbd.handover.notes.stale_params
