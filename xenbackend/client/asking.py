"""A service's client: each question and each order is a method, and blocks until it is answered.

Must not print, nor keep a connection: each request has its own, so that one client is for many threads.
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
    """Asks the service at a control socket. What cannot be had is a `ServiceError`, of the class that its code has.

    socket     the control socket's path
    timeout_s  how long an order is waited for; then `UnderWay` has its number, and it goes on. None: until it is done
    waiting    called several times a second, with the seconds for which an answer has been waited for
    answer_s   how long the answer to a question is waited for, and that to an order beyond `timeout_s`; 10 s
    """

    def __init__(
        self,
        socket: str = "",
        *,
        timeout_s: float | None = None,
        waiting: Waiting | None = None,
        answer_s: float | None = None,
    ) -> None:
        """Ask the service at `socket`; else where $XENBACKEND_SOCKET says, or where a package has it."""
        self.socket = socket or client.default_socket()
        self.timeout_s = timeout_s
        self.waiting = waiting
        self.answer_s = client.TIMEOUT_S if answer_s is None else answer_s

    def service(self) -> Service:
        """Return what the service says of itself."""
        return self._typed(results.service, self._ask({"verb": "ping"}))

    def disks(self, *vbds: str, looks: bool = False) -> list[Disk]:
        """Return all disks in service, or those that are named, such as ``5/xvda`` or ``guest/xvda``.

        With `looks` also what their files' names mean by now, which is looked up. Raises: Invalid, where one that is
        named is not in service.
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
        """Return one of them. Raises: Invalid, where it is not among them."""
        said = self._ask({"verb": "orders", "order": number})
        return self._typed(lambda said: results.each_of(results.order, said)[0], said)

    def wait(self, number: int) -> Order:
        """Return an order once it has ended, well or not, over a restart of the service, too.

        Raises: UnderWay after `timeout_s`; Invalid, where it is not among the last ones.
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

        With `replace` it may have another file, device or image at its bottom, whose content must be the same.
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
        """Put a new image over a running guest's, at a whole path; `@NAME` is one that an image of a cluster keeps."""
        return self._done(Changed, self._order("snapshot", vbd, file=file, format=image_format))

    def resize(self, vbd: str) -> Changed:
        """Tell a running guest that its disk has grown."""
        return self._done(Changed, self._order("resize", vbd))

    def keep(self, vbd: str, file: str) -> Changed:
        """Give the unnamed file of a `cow:` a name, which is a whole path."""
        return self._done(Changed, self._order("keep", vbd, title="cow keep", file=file))

    def drop(self, vbd: str, *, force: bool = False) -> Changed:
        """Forget what was written to such a file; with `force` also while a guest uses the disk."""
        return self._done(Changed, self._order("drop", vbd, title="cow drop", force=force))

    def policy(self, vbd: str, policy: str = "") -> Policy:
        """Return the policy for requests that fail, once it has been changed as `policy` says, if that says something.

        It is a text such as ``enospc=report``.
        """
        return self._done(Policy, self._order("policy", vbd, policy=policy))

    def upgrade(self, vbd: str) -> Upgraded:
        """Let a new process serve a disk, of the program that is installed now."""
        return self._done(Upgraded, self._order("upgrade", vbd), worker=None)

    def measure(self, vbd: str, seconds: float) -> Measured:
        """Time each layer of a disk's chain from now on, and return what was found after so many seconds.

        It ends when nobody waits for it any more. Raises: Busy, where the disk is measured already.
        """
        return self._done(Measured, self._order("measure", vbd, seconds=seconds))

    def end_measure(self, vbd: str) -> Done:
        """End a measurement that is under way, if there is one: whoever waits for it gets the times until now."""
        return self._done(Done, self._order("end_measure", vbd))

    def command(self, vbd: str, layer: str, command: str, *arguments: str) -> str:
        """Give a layer a command of its driver, and return its answer: ``command("5/xvda", "log", "status")``.

        `layer` is the driver's name, or the layer's number in the chain.
        """
        more = {"layer": layer, "command": command, "arguments": list(arguments)}
        return str(self._order("command", vbd, title=f"{layer} {command}", **more).data)

    def stop(self, *, force: bool = False) -> Stopped:
        """End the service and its workers in order; guests hang until it is started again.

        With `force` also where guests lose what they wrote to disks of `cow:` without a file.
        """
        answer = self._give({"verb": "stop", **_flag("force", is_set=force)}, "stop")
        return self._done(Stopped, answer, untold=[])

    def _ask(self, request: dict[str, Any]) -> Any:
        return client.call(self.socket, request, self.answer_s, self.waiting).data

    def _order(self, verb: str, vbd: str, *, title: str = "", **more: Any) -> Answer:
        return self._give({"verb": verb, "vbd": vbd, **more}, f"{_checked(vbd)}: {title or verb}")

    def _give(self, request: dict[str, Any], what: str) -> Answer:
        """Give an order; one that the service leaves to the next one is waited for there, unless time is limited."""
        token = os.urandom(8).hex()  # by which it is known again
        try:
            return client.give_order(
                self.socket, {**request, "token": token}, what, self.timeout_s, self.waiting, self.answer_s
            )
        except UnderWay as problem:
            if self.timeout_s is not None or request["verb"] not in FOLLOWED or request.get("dry_run"):
                raise
            return follow(self.orders, self.disks, token, problem, self.waiting)

    def _check_that_it_refuses(self) -> None:
        """Raise Failed for a service of release 0.1.0, which does any exchange at once, and has no look at it."""
        if not self.service().version:
            problem = (
                f"the service at {self.socket} is of release 0.1.0, which would look at nothing before it does that"
            )
            sentence = f"{problem}; restart it with: systemctl restart xenbackend"
            raise ServiceError(Answer(Code.FAILED, sentence=sentence))

    def _done(self, cls: type[_T], answer: Answer, **defaults: object) -> _T:
        return self._typed(lambda said: results.done(cls, answer.order, said, **defaults), answer.data)

    def _typed(self, read: Callable[[Any], _T], said: Any) -> _T:
        """Return what was said, typed. Raises: Failed, where no service of ours says that."""
        try:
            return read(said)
        except (ValueError, TypeError, LookupError):
            raise client.no_service(self.socket) from None


def _flag(name: str, *, is_set: bool) -> dict[str, Any]:
    """Return the part of a request that is left out where it is not wanted."""
    return {name: True} if is_set else {}


def _chosen(disks: list[Disk], names: list[DiskName]) -> list[Disk]:
    """Return those that are named, all without a name. Raises: Invalid, for a name that none has."""
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
