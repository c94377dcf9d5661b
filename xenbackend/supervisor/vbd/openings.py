"""What may be opened for the workers of one vbd: the job for each order or question that may open something.

Must not trust a worker: everything in a job comes from the toolstack, from an operator's order, or from the notes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from xenbackend import journal
from xenbackend.block.servers import servers_of
from xenbackend.block.spec import parse_chain
from xenbackend.errors import ConfigError
from xenbackend.protocol import messages
from xenbackend.protocol.jobs import Job, KeptFile
from xenbackend.protocol.opening import Connected, Found, Made, Opened, Undrained
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.device import Device
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.xenstore.paths import VbdPath


class Openings:
    """The jobs of one vbd's openers.

    may_wait    whether its worker may only have looked at the chain until now
    """

    def __init__(self, path: VbdPath, context: Context, device: Device, handover: Handover) -> None:
        self.may_wait = True  # as an earlier service may have ordered
        self._path = path
        self._context = context
        self._device = device
        self._handover = handover
        self._mode: tuple[bool, bool] | None = None  # read_only, shareable: as the worker was told
        self._comes = False  # the guest is migrated here, and may write at its source until then
        self._has_export = False  # the worker's socket for a device model was there
        self._may_export: str | None = None  # at which path, as the worker was told; None: by an earlier service

    @property
    def export(self) -> str:
        """Path of the socket on which a worker serves a device model."""
        directory = Path(self._context.settings.socket).parent / "nbd"
        return str(directory / f"{str(self._path).replace('/', '-')}.sock")

    @property
    def _turns(self) -> str:
        """Path of the file by which openers take turns at work that takes much memory."""
        return str(Path(self._context.settings.socket).parent / "turns")

    def resumes(self, *, has_opened: bool) -> bool:
        """Return whether the guest may have written through an earlier worker; `has_opened`: one has opened the chain.

        If the guest is migrated here, that one may only have looked at the chain; one that serves notes what is agreed.
        """
        return has_opened and not (self._comes and journal.AGREED.read(self._handover.page) is None)

    def for_order(self, order: messages.Open | messages.Serve) -> Job | None:
        """Return the job for an order; None if it opens nothing."""
        if isinstance(order, messages.Open):
            self.may_wait, self._mode = order.may_wait, (order.read_only, order.shareable)
            self._comes |= order.may_wait
            self._may_export = order.export
            job = self._job([order.chain])
            return replace(job, host=order.host, frontend_domid=order.frontend_domid, export=order.export)
        if not self.may_wait:
            return None
        self.may_wait = False
        return self._job([self._handover.chain_in_service()])

    def for_question(self, question: messages.Question) -> Job | None:
        """Return the job for a question; None if it opens nothing."""
        chain = self._handover.notes.chain
        match question:
            case messages.Swap():
                exchange = self._handover.notes.exchange
                names, renews = (exchange.names_unnamed, exchange.renews_unnamed) if exchange else ("", False)
                job = replace(self._job([chain, question.chain]), keeps=question.is_resize)
                return replace(job, names_unnamed=names, renews_unnamed=renews)
            case messages.Branch() if messages.own_snapshot(question.file) is None:
                return replace(self._job([chain]), makes=question.file)
            case messages.Reconnect():
                return replace(self._job([self._handover.chain_in_service()]), only_connects=True)
        return None

    def may_reconnect(self) -> bool:
        """Return whether a worker may have lost a connection: whether the chain in service names a server."""
        try:
            return _names_server(self._handover.chain_in_service())
        except ConfigError:
            return False

    def kept(self) -> list[int]:
        """Return the descriptors of a job's kept files and connections, which stay ours."""
        return [fd for _, fd in [*self._handover.files.kept(), *self._handover.connections.kept()]]

    def found(self, question: messages.Question | None, found: Found, fds: list[int]) -> str:
        """Keep what an opener has found for a question, or for an order; `fds` are ours now.

        Return why the worker may not have it; empty: it may.
        """
        connections = self._handover.connections
        match found:
            case Opened():
                return self._opened(question, found, fds[0])
            case Made():
                return self._handover.keep(found.name, fds[0])
            case Connected():
                return connections.take(found.server, found.place, fds[0], is_alone=found.is_alone)
            case Undrained():
                connections.is_undrained(found.server, found.place, is_broken=found.is_broken)
        return ""

    def _opened(self, question: messages.Question | None, found: Opened, fd: int) -> str:
        swap = question if isinstance(question, messages.Swap) else messages.Swap("")
        files, is_next = self._handover.files, found.chain > 0
        if is_next and swap.is_dry_run:
            os.close(fd)
            return files.check(found.name, found.identity, is_next=True, replaces=swap.replaces)
        return files.take(
            found.name, found.identity, fd,
            is_next=is_next, replaces=swap.replaces, may_grow=swap.is_resize, is_again=found.is_again,
        )  # fmt: skip

    def believed_export(self, path: str) -> str | None:
        """Return at which path a worker that says `path` serves a device model; None if nobody has named that path.

        A toolstack has QEMU connect there, as root. So nothing but our own path is returned, or an empty one, not even
        the path that an earlier service with another `socket` in its settings may have named to its worker.
        """
        if not path or path == self._may_export:
            return path
        if self._may_export is None:
            return path if path == self.export else ""
        return None

    def saw_export(self, path: str) -> None:
        """Note whether the worker serves a device model; remove the socket for good once it no longer does."""
        if path:
            self._has_export = True
        elif self._has_export:
            self.remove_export()

    def remove_export(self) -> None:
        """Remove the socket, which no worker uses any more."""
        self._has_export, self._may_export = False, ""
        with suppress(OSError):  # the next opener replaces it
            Path(self.export).unlink(missing_ok=True)

    def _job(self, chains: list[str]) -> Job:
        spec = self._device.sight.spec
        asked = (spec.read_only, spec.shareable) if spec else (True, False)  # an earlier service has told the worker
        read_only, shareable = self._mode or asked
        kept = [KeptFile(file.name, file.identity) for file, _ in self._handover.files.kept()]
        parents, in_service = self._context.settings.parents, self._handover.notes.in_service
        return Job(
            str(self._path), chains, read_only, shareable, kept=kept, parents=parents, in_service=in_service,
            connections=[each for each, _ in self._handover.connections.kept()], turns=self._turns,
            scratch=self._context.settings.scratch,
        )  # fmt: skip


@lru_cache(maxsize=512)  # a worker can make us ask for each of its standings
def _names_server(chain: str) -> bool:
    """Return whether a chain's text names a server. Raises: ConfigError."""
    return any(servers_of(layer.options) for layer in parse_chain(chain).layers)
