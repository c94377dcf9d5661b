"""A client of a service: each question and each order is a method, which blocks until it is answered.

Must not print, nor keep a connection: each request has its own, so that several threads may use one client.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from xenbackend.client import results
from xenbackend.client.following import FOLLOWED, follow, wait_for
from xenbackend.client.results import (
    Changed,
    Disk,
    Done,
    Measured,
    Order,
    Planned,
    Policy,
    Service,
    Stopped,
    Upgraded,
)
from xenbackend.disks import DiskName, parse_disk
from xenbackend.errors import ConfigError
from xenbackend.protocol import client
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError, UnderWay, Waiting
from xenbackend.protocol.codes import Code

_T = TypeVar("_T")


class Client:
    """Asks the service at a control socket. Failures raise the subclass of `ServiceError` that belongs to the code.

    socket     the control socket's path
    timeout_s  how long to wait for an order; then `UnderWay` has its number, and it goes on. None: until it is done
    waiting    called several times a second during a wait, with the seconds waited so far
    answer_s   how long to wait for the answer to a question, and for that to an order beyond `timeout_s`; default 10 s
    """

    def __init__(
        self,
        socket: str = "",
        *,
        timeout_s: float | None = None,
        waiting: Waiting | None = None,
        answer_s: float | None = None,
    ) -> None:
        """Use `socket`; by default the one that $XENBACKEND_SOCKET names, or the package's."""
        self.socket = socket or client.default_socket()
        self.timeout_s = timeout_s
        self.waiting = waiting
        self.answer_s = client.TIMEOUT_S if answer_s is None else answer_s

    def service(self) -> Service:
        """Return what the service reports about itself."""
        return self._typed(results.service, self._ask({"verb": "ping"}))

    def disks(self, *vbds: str, looks: bool = False) -> list[Disk]:
        """Return all disks in service, or those that are named, such as ``5/xvda`` or ``guest/xvda``.

        With `looks`, look up what the names of their files mean by now. Raises: Invalid, if a disk that is named is not
        in service.
        """
        names = [_checked(each) for each in vbds]
        said = self._ask({"verb": "status", **_flag("looks", is_set=looks)})
        return self._typed(lambda said: _chosen(results.each_of(results.disk, said), names), said)

    def disk(self, vbd: str) -> Disk:
        """Return a disk in service. Raises: Invalid."""
        return self.disks(vbd)[0]

    def orders(self) -> list[Order]:
        """Return the last orders, the latest at the end."""
        return self._typed(lambda said: results.each_of(results.order, said), self._ask({"verb": "orders"}))

    def order(self, number: int) -> Order:
        """Return one of the last orders. Raises: Invalid, if it is not among them."""
        said = self._ask({"verb": "orders", "order": number})
        return self._typed(lambda said: results.each_of(results.order, said)[0], said)

    def wait(self, number: int) -> Order:
        """Return an order once it has ended, with success or not; a restart of the service does not end the wait.

        Raises: UnderWay, after `timeout_s`; Invalid, if it is not among the last orders.
        """
        return wait_for(lambda: self.order(number), self.timeout_s, self.waiting)

    def pause(self, vbd: str) -> Done:
        """Take no more requests from a guest, and return once none is in flight."""
        return self._done(Done, self._order("pause", vbd))

    def resume(self, vbd: str) -> Done:
        """Continue to serve a disk, whatever stopped it."""
        return self._done(Done, self._order("resume", vbd))

    def set(self, vbd: str, chain: str, *, replace: bool = False) -> Changed:
        """Serve a running guest through another chain over the same content.

        With `replace` the chain may end in another file, device or image, whose content must be the same.
        """
        if not replace:
            self._check_that_it_refuses()
        return self._done(Changed, self._order("set", vbd, chain=chain, **_flag("replace", is_set=replace)))

    def plan(self, vbd: str, chain: str, *, replace: bool = False) -> Planned:
        """Return which layers `set` would lead to; nothing is changed."""
        self._check_that_it_refuses()
        more = {"dry_run": True, **_flag("replace", is_set=replace)}
        return self._done(Planned, self._order("set", vbd, chain=chain, **more))

    def snapshot(self, vbd: str, file: str, *, image_format: str = "") -> Changed:
        """Put a new image, at an absolute path, over a running guest's; for `@NAME` a cluster's image keeps it."""
        return self._done(Changed, self._order("snapshot", vbd, file=file, format=image_format))

    def resize(self, vbd: str) -> Changed:
        """Tell a running guest that its disk has grown."""
        return self._done(Changed, self._order("resize", vbd))

    def keep(self, vbd: str, file: str) -> Changed:
        """Give the unnamed file of a `cow:` layer a name: an absolute path."""
        return self._done(Changed, self._order("keep", vbd, title="cow keep", file=file))

    def drop(self, vbd: str, *, force: bool = False) -> Changed:
        """Discard what was written to the file of a `cow:` layer; with `force` also while a guest uses the disk."""
        return self._done(Changed, self._order("drop", vbd, title="cow drop", force=force))

    def policy(self, vbd: str, policy: str = "") -> Policy:
        """Return the policy for requests that fail, after changing it if `policy` is not empty.

        A policy is a text such as ``enospc=report``.
        """
        return self._done(Policy, self._order("policy", vbd, policy=policy))

    def upgrade(self, vbd: str) -> Upgraded:
        """Serve a disk by a new process, from the program that is installed now."""
        return self._done(Upgraded, self._order("upgrade", vbd), worker=None)

    def measure(self, vbd: str, seconds: float) -> Measured:
        """Time each layer of a disk's chain for so many seconds, and return the result.

        The service ends the measurement early if this client disconnects. Raises: Busy, if one is under way.
        """
        return self._done(Measured, self._order("measure", vbd, seconds=seconds))

    def end_measure(self, vbd: str) -> Done:
        """End the measurement that is under way, if there is one. Its client gets the times so far."""
        return self._done(Done, self._order("end_measure", vbd))

    def command(self, vbd: str, layer: str, command: str, *arguments: str) -> str:
        """Give a layer a command of its driver, and return its answer: ``command("5/xvda", "log", "status")``.

        `layer` is the driver's name, or the layer's number in the chain.
        """
        more = {"layer": layer, "command": command, "arguments": list(arguments)}
        return str(self._order("command", vbd, title=f"{layer} {command}", **more).data)

    def stop(self, *, force: bool = False) -> Stopped:
        """Stop the service and its workers; guests hang until it is started again.

        With `force` also if guests lose what they wrote to `cow:` layers without a file.
        """
        answer = self._give({"verb": "stop", **_flag("force", is_set=force)}, "stop")
        return self._done(Stopped, answer, untold=[])

    def _ask(self, request: dict[str, Any]) -> Any:
        return client.call(self.socket, request, self.answer_s, self.waiting).data

    def _order(self, verb: str, vbd: str, *, title: str = "", **more: Any) -> Answer:
        return self._give({"verb": verb, "vbd": vbd, **more}, f"{_checked(vbd)}: {title or verb}")

    def _give(self, request: dict[str, Any], what: str) -> Answer:
        """Give an order; if the service leaves it to the next service, wait for it there, unless time is limited."""
        token = os.urandom(8).hex()  # finds this order among others in the next service's ledger
        try:
            return client.give_order(
                self.socket, {**request, "token": token}, what, self.timeout_s, self.waiting, self.answer_s
            )
        except UnderWay as problem:
            if self.timeout_s is not None or request["verb"] not in FOLLOWED or request.get("dry_run"):
                raise
            return follow(self.orders, self.disks, token, problem, self.waiting)

    def _check_that_it_refuses(self) -> None:
        """Raise Failed for a service of release 0.1.0, which would make an exchange without checking it."""
        if not self.service().version:
            problem = f"the service at {self.socket} is of release 0.1.0, which does not check an exchange first"
            sentence = f"{problem}; restart it with: systemctl restart xenbackend"
            raise ServiceError(Answer(Code.FAILED, sentence=sentence))

    def _done(self, cls: type[_T], answer: Answer, **defaults: object) -> _T:
        return self._typed(lambda said: results.done(cls, answer.order, said, **defaults), answer.data)

    def _typed(self, read: Callable[[Any], _T], said: Any) -> _T:
        """Return an answer's data, typed. Raises: Failed, if no service of ours answers so."""
        try:
            return read(said)
        except (ValueError, TypeError, LookupError):
            raise client.no_service(self.socket) from None


def _flag(name: str, *, is_set: bool) -> dict[str, Any]:
    """Return a part of a request, which is left out unless it is wanted."""
    return {name: True} if is_set else {}


def _chosen(disks: list[Disk], names: list[DiskName]) -> list[Disk]:
    """Return the disks that are named, or all if there are no names. Raises: Invalid, for a name that no disk has."""
    for name in names:
        if not any(each.is_called(name) for each in disks):
            served = ", ".join(each.vbd for each in disks) or "none at all"
            sentence = f"there is no disk {name} in service; there are {served}"
            raise ServiceError(Answer(Code.INVALID, sentence=sentence))
    return [each for each in disks if not names or any(map(each.is_called, names))]


def _checked(vbd: str) -> DiskName:
    """Return the name of a disk. Raises: Invalid."""
    try:
        return parse_disk(vbd)
    except ConfigError as problem:
        raise ServiceError(Answer(Code.INVALID, sentence=str(problem))) from None
