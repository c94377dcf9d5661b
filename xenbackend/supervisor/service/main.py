"""The service: one loop that joins xenstore, the workers and the control socket, in the foreground or as a daemon.

Must not contain a rule about a vbd.

SIGTERM ends the service and leaves the workers serving, if a keeper has their sockets for the next service (`keeper`);
guests do not notice. The service first waits for exchanges of chains, because systemd sends the same signal before it
drops all that it keeps. After SIGINT, or SIGTERM without a keeper, every worker finishes what is in flight and closes
its chain, and the vbds' states stay as they are: a guest sees a pause, until the next service serves the same rings.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from xenbackend import log
from xenbackend.errors import ConfigError, KernelError, XenbackendError
from xenbackend.kernel import process
from xenbackend.kernel.ports import check_host
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.signals import taking_signals
from xenbackend.protocol.answers import Answer, code_of, of_bug
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service import access, fleet, former_settings, zygote
from xenbackend.supervisor.service.bugs import Bugs
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.listening import check_place
from xenbackend.supervisor.service.looks import Looks
from xenbackend.supervisor.service.notify import Notifier
from xenbackend.supervisor.service.questions import Questions
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.server import Handler, Peer, Reply, Server
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.sharing import Sharing
from xenbackend.supervisor.service.status import describe_service
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd import ending
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.inheritance import check_versions, is_of_a_disk
from xenbackend.supervisor.vbd.last_chains import LastChains, state_directory
from xenbackend.supervisor.vbd.orders import ORDERS
from xenbackend.supervisor.vbd.requests import only_reads, text_of, token_of
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.paths import VbdPath, parse_backend_path
from xenbackend.supervisor.xenstore.store import Store

_CONTROL = "control"  # the control socket's name at the keeper
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The key of a request that says what an order changes something to, by verb.
_ORDERED = {"set": "chain", "snapshot": "file", "keep": "file", "policy": "policy", "command": "command"}


class Service:
    """Everything that is open while the service runs."""

    def __init__(
        self,
        settings: Settings,
        notifier: Notifier,
        keeper: Keeper,
        complaint: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        state_directory: Path | None = None,
    ) -> None:
        """Connect to xenstore and listen; `complaint` says why these are the settings of an earlier service, if so.

        `state_directory` is where files are left for the next service, by default the control socket's directory.
        Raises: XenbackendError.
        """
        self._log = log.get_logger("service")
        self._notifier = notifier
        self._keeper = keeper
        self._bugs = Bugs()
        self._loop = Reactor(clock, on_bug=self._bugs.note)
        keeper.send_again_from(self._loop)
        notifier.send_again_from(self._loop)
        self._store = Store(settings.store or None)
        self._ledger = Ledger(keeper, wall_clock)
        inherited = keeper.inherited.pop(_CONTROL, -1)  # the rest is the registry's
        options = ("--host", settings.host, "--walls", settings.walls)
        self._fleet = Fleet(self._loop, command=(*fleet.COMMAND, *options), zygote=(*zygote.COMMAND, *options))
        self._last_chains = LastChains(state_directory or Path(settings.socket).parent)
        common = (self._store, self._loop, self._fleet, settings, Bus(), keeper, wall_clock)
        context = Context(*common, self._ledger, self._last_chains)
        xentop = Xentop(Path(settings.socket).parent / "xentop")
        self._registry = Registry(context, Vbd, xentop=xentop, on_change=self._count)
        self._questions = Questions(self._registry, Looks(self._fleet, self._loop), self._ledger, self._loop)
        group = access.group_number(settings.group)
        gates = dict.fromkeys(("status", *ORDERS), self._registry.when_found)  # no disk may seem to be gone till then
        self._server = Server(settings.socket, self._loop, self._answer, inherited, group, gates)
        self._complaint, self._host = complaint, settings.host
        self._keep(settings, is_new=self._server.fileno() != inherited)
        self._is_stopping = self._leaves = self._has_let_go = False
        self._last_chains.on_change = self._leave_soon
        self._leave_at = self._loop.timer(self._let_go)
        self._stops: list[Reply] = []  # to the clients that ordered the stop
        self._attaches: dict[str, int] = {}  # that a former service did not live to end: numbers by token
        self._reads = 0  # orders that only read, which have no number in the ledger
        self._status_timer = self._loop.timer(self._tell_status)
        self._alive_timer = self._loop.timer(self._tell_alive)
        self._verbs = self._handlers()

    def _handlers(self) -> dict[str, Handler]:
        """Return the handler of each verb."""
        return {
            "ping": self._ping,
            "status": self._questions.status,
            "orders": self._questions.orders,
            "hotplug": self._hotplug,
            "stop": self._stop_by_order,
            **dict.fromkeys(ORDERS, self._order),
        }

    def _keep(self, settings: Settings, *, is_new: bool) -> None:
        """Have kept what the next service needs if this one ends or dies: the settings, and the control socket."""
        try:
            if is_new:
                self._keeper.replace(_CONTROL, self._server.fileno())
            former_settings.leave(settings, self._keeper)
        except KernelError as error:
            self._log.warning(str(error))

    def run(self) -> int:
        """Serve until a signal comes, then end as it asks, and return the exit status."""
        with taking_signals(self._loop, _SIGNALS, self._stop):
            self._fleet.prepare()
            self._registry.start()
            Sharing(self._loop, self._registry.vbds).look()
            left = [each for each in self._ledger.entries() if each["ended"] is None]
            self._attaches = {each["token"]: each["number"] for each in left if each["verb"] == "attach"}
            self._go_on_with_orders(left)
            self._notifier.ready()
            self._log.info("serving", domid=self._registry.domid)
            if self._complaint:
                self._log.error(
                    "the settings are invalid; those of the former service stay in force", reason=self._complaint
                )
            # The vbds that were found are looked at in the next pass, before this is called.
            self._registry.when_found(partial(self._loop.call_soon, partial(process.unboost, os.getpid())))
            self._tell_status()
            self._tell_alive()
            self._loop.run()
        self._close()
        return 0

    def _count(self) -> None:
        """Note that there is one vbd more or less."""
        self._status_timer.set(self._loop.now())
        if self._is_stopping and not self._registry.vbds:
            self._loop.stop()

    def _tell_status(self) -> None:
        sentence = f"serving {len(self._registry.vbds)} vbds"
        if self._complaint:
            sentence += f" by the former service's settings: {self._complaint}"
        self._notifier.status(sentence)

    def _tell_alive(self) -> None:
        if self._notifier.interval_s is not None:
            self._notifier.alive()
            self._alive_timer.set(self._loop.now() + self._notifier.interval_s)

    def _go_on_with_orders(self, entries: list[dict[str, Any]]) -> None:
        """Go on with these orders, which an earlier service did not live to end, or close them.

        A vbd itself finds out how far an exchange of its chain came. Vbds that are still being taken over are looked at
        again later, with these orders and no newer ones, which must not be undone.
        """
        awaited = []
        vbds = {vbd.path.disk: vbd for vbd in self._registry.vbds.values()}
        for entry in entries:
            close, vbd = partial(self._ledger.close, entry["number"]), vbds.get(entry["vbd"])
            if vbd is None and not self._registry.has_taken_over:
                awaited.append(entry)
            elif vbd is None and entry["verb"] == "detach":
                close(Answer(Code.OK))
            elif vbd is None:
                close(Answer(Code.GONE, None, "the service ended before the order was done"))
            elif entry["verb"] == "attach":
                self._loop.call_soon(partial(vbd.hotplug, close))
            else:
                go_on = partial(vbd.orders.go_on, entry["verb"], entry["to"], entry["number"])
                try:
                    self._give(vbd, go_on, close)
                except Exception as bug:  # which must not keep the service from starting
                    self._loop.bug(bug)
        if awaited:
            self._loop.call_later(1.0, partial(self._go_on_with_orders, awaited))

    def _stop(self, number: int) -> None:
        """End the service, as the signal of this number asks."""
        if self._is_stopping:
            if number == signal.SIGINT and self._leaves:
                self._log.info("stopping for good, as the parent ends, too")
                self._leaves = False  # nobody would keep what the next service needs
                if not self._has_let_go:  # else the workers close their disks when the keeper has closed their sockets
                    self._let_go()
            return
        self._leaves = leaves = self._keeper.is_there and number != signal.SIGINT
        self._log.info("stopping", vbds=len(self._registry.vbds), workers="go on" if leaves else "are drained")
        self._notifier.stopping()
        self._is_stopping = True
        exchanging = [each.disk for each in self._exchanging()] if leaves else []
        if exchanging:
            wait_s = f"{ending.WAIT_S:.0f}"
            self._log.info("waiting for exchanges of chains to end", disks=", ".join(exchanging), seconds=wait_s)
            self._leave_at.set(self._loop.now() + ending.WAIT_S)
        else:
            self._let_go()

    def _exchanging(self) -> list[VbdPath]:
        """Return the vbds whose chain is being exchanged, which a worker might finish alone and unnoticed."""
        return [path for path, vbd in self._registry.vbds.items() if vbd.orders.is_exchanging()]

    def _leave_soon(self) -> None:
        """Leave all disks once no chain is being exchanged any more; they are served until then."""
        if self._leave_at.due is not None and not self._exchanging():
            self._leave_at.set(self._loop.now())

    def _let_go(self) -> None:
        self._leave_at.set(None)
        self._has_let_go = True
        self._registry.stop(leaves=self._leaves)
        if not self._registry.vbds:
            self._loop.stop()

    def _close(self) -> None:
        self._answer_stops()
        self._registry.close()
        self._questions.close()
        self._fleet.close()
        if self._leaves:
            self._ledger.leave()
        else:
            self._ledger.forget()
            with suppress(KernelError):
                self._keeper.forget(_CONTROL)
        self._keeper.close(waits=self._leaves)
        self._server.close(leaves=self._leaves)
        self._store.close()
        self._loop.close()
        self._log.info("stopped")

    def _answer(self, request: dict[str, Any], peer: Peer, reply: Reply) -> None:
        """Handle a request of a client of the control socket."""
        verb = request.get("verb")
        handle = self._verbs.get(verb) if isinstance(verb, str) else None
        try:
            if handle is None:
                raise ConfigError(f"unknown request; the verbs are {', '.join(self._verbs)}")
            if verb not in access.CHANGES_NOTHING and not access.is_ours(peer.uid):
                raise ConfigError(f"{verb} changes something, which only root may do")
            if self._leaves and (verb in ORDERS or (verb == "status" and self._has_let_go)):
                reply(Answer(Code.GONE, None, "the service is being replaced; ask again"))
                return
            handle(request, peer, reply)
        except XenbackendError as error:
            reply(Answer(code_of(error), None, str(error)))

    def _ping(self, _request: Mapping[str, Any], _peer: Peer, reply: Reply) -> None:
        counts = {"bugs": self._bugs.count, "breaches": self._fleet.breaches}
        reply(Answer(Code.OK, {**describe_service(self._store, self._host), **counts, "waits": self._waits()}))

    def _waits(self) -> list[dict[str, str]]:
        """Return for which disks the service waits before it ends, and what for; none while it is not ending."""
        vbds = [each for _, each in sorted(self._registry.vbds.items())] if self._is_stopping else []
        return [{"vbd": each.path.disk, "for": each.ending.waits_for} for each in vbds]

    def _hotplug(self, request: Mapping[str, Any], peer: Peer, reply: Reply) -> None:
        if request.get("action") != "add":
            raise ConfigError("the action of hotplug must be add")
        path = text_of(request, "path")
        found = parse_backend_path(path, self._registry.domid)
        if "chain" not in request or found is None:  # a toolstack's script
            self._registry.hotplug(path, reply)
            return
        given = {"to": text_of(request, "chain"), "token": token_of(request)}  # of `xenbackend attach`
        number = self._attaches.get(given["token"]) if given["token"] else None  # it has asked a former service first
        number = reply.order = number or self._ledger.open("attach", found[0].disk, asdict(peer), given)

        def answer(how: Answer) -> None:
            self._ledger.close(number, how)
            reply(replace(how, order=number))

        try:
            self._registry.hotplug(path, answer)
        except XenbackendError as error:
            answer(Answer(code_of(error), None, str(error)))

    def _stop_by_order(self, request: Mapping[str, Any], peer: Peer, reply: Reply) -> None:
        """End the service, and answer at the very end."""
        if self._leaves:
            reply(Answer(Code.GONE, None, "the service is being replaced; ask again"))
            return
        if request.get("force") is not True and not self._is_stopping:  # else there is nothing left to refuse
            self._registry.vbds.refuse_to_lose()
        reply.order = self._ledger.open("stop", "", asdict(peer), {})
        reply.known = lambda: {"pid": os.getpid(), "waits": self._waits()}
        self._stops.append(reply)
        self._stop(signal.SIGINT)

    def _answer_stops(self) -> None:
        """Tell the clients that ordered the stop that it is done, and which chains xenstore does not know of."""
        left = sorted(self._last_chains.left.items())
        untold = [{"vbd": path.disk, "chain": last.chain, "next_chain": last.next_chain} for path, last in left]
        for reply in self._stops:
            answer = Answer(Code.OK, {"pid": os.getpid(), "untold": untold}, order=reply.order)
            self._ledger.close(reply.order or 0, answer)
            reply(answer)

    def _order(self, request: Mapping[str, Any], peer: Peer, reply: Reply) -> None:
        """Give an order to a vbd. Unless it only reads, it gets a number, and is entered into the ledger."""
        if self._is_stopping:  # what it would note of the disk is about to be forgotten
            reply(Answer(Code.GONE, None, "the service is stopping"))
            return
        verb, vbd = str(request["verb"]), self._registry.find(text_of(request, "vbd"))
        if only_reads(verb, request, vbd.chain_in_service()):
            self._reads += 1
            self._give(vbd, partial(vbd.orders.give, verb, request, -self._reads), reply)
            return
        given = {
            "from": vbd.orders.former(verb),
            "to": request.get(_ORDERED.get(verb, ""), ""),
            "token": token_of(request),
        }
        is_dry_run = request.get("dry_run") is True
        number = self._ledger.open(f"{verb}{' --dry-run' * is_dry_run}", vbd.path.disk, asdict(peer), given)
        reply.order, reply.known, reply.left = number, vbd.orders.chain_data, partial(vbd.orders.left, number)

        def answer(how: Answer) -> None:
            if how.code is not Code.UNDER_WAY:  # the next service goes on with it
                self._ledger.close(number, replace(how, data=None) if is_dry_run else how)  # it put no chain in
            reply(replace(how, order=number))
            self._leave_soon()

        if verb == "upgrade":
            self._fleet.renew()  # the zygote may have imported an older program
        self._give(vbd, partial(vbd.orders.give, verb, {**request, "by": str(peer)}, number), answer)

    @staticmethod
    def _give(vbd: Vbd, give: Callable[[Callable[[Answer], None]], None], answer: Callable[[Answer], None]) -> None:
        """Give an order to a vbd; if that fails, answer with the error."""
        try:
            give(answer)
        except XenbackendError as error:
            answer(Answer(code_of(error), vbd.orders.chain_data(), str(error)))
        except Exception as bug:
            answer(of_bug(bug))
            raise


def check(settings: Settings) -> None:
    """Check what can be checked while the operator still looks. Raises: XenbackendError."""
    check_place(settings.socket)
    access.group_number(settings.group)
    with Store(settings.store or None) as store:
        store.own_domid()


def run(read: Callable[[], Settings], environment: Mapping[str, str]) -> int:
    """Serve in the foreground, by the settings that `read` returns. Raises: XenbackendError, if that cannot begin.

    It is no ConfigError if disks are in service: its exit status makes the keeper drop everything.
    """
    keeper = Keeper(environment)
    has_disks = any(is_of_a_disk(name) for name in keeper.inherited)
    try:
        check_versions(keeper.inherited)
        service = _make(read, keeper, environment)
    except ConfigError as problem:
        if not has_disks:
            raise
        _rest(str(problem), environment)
        raise XenbackendError(str(problem)) from None
    return service.run()


def _make(read: Callable[[], Settings], keeper: Keeper, environment: Mapping[str, str]) -> Service:
    """Return the service, by the settings that `read` returns, or else former ones. Raises: XenbackendError."""

    def read_usable() -> Settings:
        settings = read()
        check_place(settings.socket, keeper.inherited.get(_CONTROL, -1))
        check_host(settings.host)
        access.group_number(settings.group)
        return settings

    settings, complaint = former_settings.choose(read_usable, keeper)
    log.configure(settings.log, settings.log_level)
    directory = state_directory(environment, settings.socket)
    return Service(settings, Notifier(environment), keeper, complaint, state_directory=directory)


def _rest(sentence: str, environment: Mapping[str, str]) -> None:
    """Say what is wrong, and wait for as many seconds as the unit says by ``REFUSED_REST_S``.

    systemd restarts us at once when we end, as guests need. It must not give up doing so: it would then drop all that
    it keeps for us, and the workers would end.
    """
    rest_s = environment.get("REFUSED_REST_S", "")
    if not rest_s.isdecimal():
        return
    process.unboost(os.getpid())
    Notifier(environment).status(sentence)
    print(f"xenbackend: {sentence}; it is tried again every {rest_s} s", file=sys.stderr, flush=True)
    time.sleep(float(rest_s))
