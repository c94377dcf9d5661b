"""Answers questions about disks and orders.

Must not change anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xenbackend.block.files import UNNAMED
from xenbackend.errors import ConfigError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.protocol.opening import Meaning
from xenbackend.supervisor.service.ledger import ORDERS as REMEMBERED
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.looks import Looks
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.server import Peer, Reply
from xenbackend.supervisor.service.status import describe
from xenbackend.supervisor.vbd.requests import text_of
from xenbackend.supervisor.vbd.vbd import Vbd


class Questions:
    """The handlers of these questions. Each gets a request, the peer that sent it, and the reply for its one answer."""

    def __init__(self, registry: Registry, looks: Looks, ledger: Ledger, loop: Reactor) -> None:
        """`looks` are ours from now on: `close` ends them."""
        self._registry = registry
        self._looks = looks
        self._ledger = ledger
        self._loop = loop

    def status(self, request: Mapping[str, Any], _peer: Peer, reply: Reply) -> None:
        """Describe all disks, or one; with `looks`, also what their files' names mean now."""
        if "vbd" in request:
            vbds = [self._registry.find(text_of(request, "vbd"))]
        else:
            vbds = [vbd for _, vbd in sorted(self._registry.vbds.items())]
        if request.get("looks") is True:
            names = [name for vbd in vbds for name in vbd.handover.files.identities() if name != UNNAMED]
            self._looks.look(names, lambda meanings: self._describe_all(vbds, meanings, reply))
        else:
            self._describe_all(vbds, {}, reply)

    def _describe_all(self, vbds: list[Vbd], meanings: Mapping[str, Meaning], reply: Reply) -> None:
        vbds = [vbd for vbd in vbds if not vbd.is_forgotten]
        guests = self._registry.names_of({vbd.path.frontend_domid for vbd in vbds})
        described = [self._describe(vbd, guests.get(vbd.path.frontend_domid, ""), meanings) for vbd in vbds]
        reply(Answer(Code.OK, [each for each in described if each]))

    def _describe(self, vbd: Vbd, guest: str, meanings: Mapping[str, Meaning]) -> dict[str, Any] | None:
        """Return what is known of one vbd; None if that meets a bug of ours, which must not hide the others."""
        try:
            return describe(vbd, guest, meanings, now=self._loop.now(), braked_s=self._registry.braked_s(vbd))
        except Exception as bug:
            bug.add_note(f"while {vbd.path} was described")
            self._loop.bug(bug)
            return None

    def orders(self, request: Mapping[str, Any], _peer: Peer, reply: Reply) -> None:
        """Answer with the last orders, or with one."""
        number = request.get("order")
        if number is None:
            reply(Answer(Code.OK, self._ledger.entries()))
            return
        entry = self._ledger.entry(number) if type(number) is int else None
        if entry is None:
            raise ConfigError(f"there is no order {number!r:.40} among the last {REMEMBERED}")
        reply(Answer(Code.OK, [entry]))

    def close(self) -> None:
        """End all looks."""
        self._looks.close()
