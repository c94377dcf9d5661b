"""How a vbd arrives: the toolstack's hotplug script waits for an answer, the vbd is taken from the kernel's backend.

Must not decide what the script is told.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.blkif.features import MAXIMA
from xenbackend.errors import XenbackendError
from xenbackend.protocol.answers import Answer, Reply
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.vbd.claim import Claim, Taking
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.notes import Claimed
from xenbackend.supervisor.xenstore.paths import VbdPath


class Arrival:
    """The arrival of one vbd.

    scripts   replies to the toolstack's hotplug scripts that wait for an answer
    limits    limits that the frontend has to keep; the maxima if the vbd was blkback's, whose offer may still hold
    """

    def __init__(
        self,
        path: VbdPath,
        context: Context,
        handover: Handover,
        then: Callable[[XenbackendError | None], None],
    ) -> None:
        """Go on with the claim that an earlier service had begun, if it had. For `then` see `Taking`."""
        self.scripts: list[Reply] = []
        self._path = path
        self._context = context
        self._handover = handover
        noted = handover.notes.claim
        self.limits = MAXIMA if noted else context.settings.limits
        self._taking = Taking(context.loop, self._claim, then, self._claim(noted) if noted else None)

    @property
    def is_under_way(self) -> bool:
        """True while the vbd is being taken from the kernel's backend; its directory may be missing meanwhile."""
        return self._taking.is_under_way

    def takes_from_kernel(self) -> bool:
        """Begin a claim if the kernel's backend has the vbd, and return whether a claim is under way."""
        if self._context.bus.has(self._path):
            self._taking.begin()
            self.limits = MAXIMA
        return self._taking.is_under_way

    def give_back(self) -> None:
        """Make the directory again at once if it is away, because the service ends. Raises: StoreError."""
        self._taking.give_back()

    def tell(self, device: Device) -> None:
        """Tell all waiting scripts whether ``hotplug-status`` is ``connected``, and if not, why not."""
        code = Code.INVALID if device.is_mistaken else Code.FAILED
        is_open = device.sight.hotplug == "connected"
        self.answer(Answer(Code.OK, "connected") if is_open else Answer(code, None, device.error))

    def answer(self, answer: Answer) -> None:
        """Give all waiting scripts this answer."""
        for reply in self.give_up():
            reply(answer)

    def give_up(self) -> list[Reply]:
        """Return the waiting scripts, and forget them here."""
        scripts, self.scripts = self.scripts, []
        return scripts

    def _claim(self, noted: Claimed | None = None) -> Claim:
        context = self._context

        def note(claimed: Claimed | None) -> None:
            self._handover.note(claim=claimed)

        return Claim(context.store, context.bus, self._path, context.loop.now, note, noted)
