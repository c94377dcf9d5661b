"""What must not be lost of a vbd when its service forgets it: which chain has the guest's data, and in which files.

Must not forget anything itself, nor keep a service that is being replaced from ending.

Where another chain took the place of the one that ``params`` names, and xenstore has not been told yet, a service that
stops waits for xenstore, its worker closed already. If that does not come in time, a file tells the next service.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xenbackend.errors import KernelError, StoreError
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.events import Stop
from xenbackend.supervisor.vbd.last_chains import LastChain
from xenbackend.supervisor.vbd.vbd_log import UNFINISHED, UNTOLD, VbdLog
from xenbackend.supervisor.vbd.vbd_nodes import VbdNodes

if TYPE_CHECKING:
    from xenbackend.supervisor.vbd.vbd import Vbd

WAIT_S = 45.0  # from the stop on; the unit's TimeoutStopSec is longer
_WAITS = "xenstore has to be told which chain is in service; the service waits for it before it ends"
_LEFT = "xenstore could not be told which chain was in service; a file tells the next service"


class Ending:
    """One vbd's."""

    def __init__(self, vbd: Vbd, context: Context, nodes: VbdNodes, log: VbdLog) -> None:
        self._vbd = vbd
        self._context = context
        self._nodes = nodes
        self._log = log
        self._give_up_at = 0.0
        self._has_said = False
        self._has_recalled = False
        self._timer = context.loop.timer(self._give_up)

    def find(self, *, is_heir: bool) -> bool:
        """Go on with what an earlier service has left in a file, and return whether anything is left of one.

        `is_heir`: it has left descriptors, with notes.
        """
        self._has_recalled = is_heir
        last = self._context.last_chains.of(self._vbd.path)
        if last is not None:
            self._vbd.handover.note(chain=last.chain, stale_params=last.stale_params)
        return is_heir or last is not None

    def saw(self, keys: Mapping[str, str]) -> None:
        """Take note of what the keys say, and with the first ones of which files are noted in xenstore."""
        handover = self._vbd.handover
        if handover.notes.stale_params:
            handover.saw_params(keys.get("params", ""))
            if not handover.notes.stale_params:
                self._context.last_chains.forget(self._vbd.path)
        if not self._has_recalled:  # what else was left has them
            chain = handover.notes.chain or keys.get("params", "")
            handover.expect(chain, self._nodes.noted_files(keys, chain))
            self._has_recalled = True

    def begin(self) -> None:
        """Leave word at once: a service that stops may be killed before it has ended. From now on its time counts."""
        self._give_up_at = self._context.loop.now() + WAIT_S
        self._timer.set(self._give_up_at)
        notes = self._vbd.handover.notes
        if notes.stale_params and not self._vbd.device.sight.is_over:
            with suppress(KernelError):  # `end` tries again, and says so
                self._leave()

    def may_end(self) -> bool:
        """Return whether the vbd may be forgotten now; else it is asked again, by an event."""
        if self._vbd.device.is_leaving or self._is_told():
            return True
        is_late = self._context.loop.now() >= self._give_up_at
        if not is_late and not self._has_said:
            self._has_said = True
            self._log.say("warning", _WAITS, chain=self._vbd.chain_in_service(), seconds=f"{WAIT_S:.0f}")
        return is_late

    def end(self) -> None:
        """Leave a file where one is needed: also where the next service is to have the notes, which it may not get."""
        self._timer.set(None)
        device, handover, chain = self._vbd.device, self._vbd.handover, self._vbd.chain_in_service()
        if not device.is_leaving and handover.agreed() is not None and self._is_waited_for():
            self._log.say("critical", UNFINISHED)
        if device.sight.is_over or not handover.notes.stale_params:
            self._context.last_chains.forget(self._vbd.path)
            return
        try:
            file = self._leave()
        except KernelError as error:
            self._log.say("critical", UNTOLD, chain=chain, reason=str(error))
        else:
            self._log.say("warning", _LEFT, chain=chain, file=str(file))

    def _is_waited_for(self) -> bool:
        """Return whether there is a guest that has rings: it may have gone since the last look."""
        if not self._vbd.device.is_waited_for():
            return False
        try:
            return self._nodes.read_frontend("state") is not None
        except StoreError:
            return True

    def _give_up(self) -> None:
        """End whatever is unfinished, where that cannot be done without xenstore."""
        if self._context.store.is_connected:
            self._timer.set(self._context.loop.now() + WAIT_S)
            self._vbd.look_soon(node=True)
        else:
            self._vbd.handle(Stop(self._vbd.device.is_leaving))

    def _leave(self) -> Path:
        last = LastChain(self._vbd.chain_in_service(), self._vbd.handover.notes.stale_params)
        return self._context.last_chains.leave(self._vbd.path, last)

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
