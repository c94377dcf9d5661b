"""The service: one loop that joins xenstore, the workers and the control socket, in the foreground or as a daemon.

Must not contain a rule about a vbd.

SIGTERM ends the service and leaves the workers serving, where a keeper has their sockets for the next service
(`keeper`): guests do not notice. SIGINT, and SIGTERM without a keeper, drain every worker, close its chain and leave
the vbds' states as they are: to a guest it is a pause, until the next service serves the same rings.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from xenbackend import log
from xenbackend.errors import ConfigError, KernelError, XenbackendError
from xenbackend.kernel import process
from xenbackend.kernel.ports import check_host
from xenbackend.supervisor.service import former_settings, parent, zygote
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.notify import Notifier
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.server import Reply, Server, check_place
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.status import describe
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd.inheritance import check_versions
from xenbackend.supervisor.vbd.orders import ORDERS, give
from xenbackend.supervisor.xenstore.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL = "control"  # the control socket's name at the keeper
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Service:
    """Everything that is open while the service runs."""

    def __init__(self, settings: Settings, notifier: Notifier, keeper: Keeper, complaint: str = "") -> None:
        """Connect to xenstore and listen; `complaint` is why these are not the settings that should be.

        Raises: StoreError, ConfigError.
        """
        self._log = log.get_logger("service")
        self._notifier = notifier
        self._selector = selectors.DefaultSelector()
        self._store = Store(settings.store or None)
        xentop = Xentop(Path(settings.socket).parent / "xentop")
        self._keeper = keeper
        inherited = self._keeper.inherited.pop(_CONTROL, -1)  # the rest is the registry's
        self._fleet = Fleet(self._selector, zygote=(*zygote.COMMAND, "--host", settings.host))
        self._registry = Registry(
            self._store, self._fleet, settings, self._selector, xentop=xentop, keeper=self._keeper
        )
        self._server = Server(settings.socket, self._selector, self._answer, time.monotonic, inherited)
        self._complaint = complaint
        self._keep(settings, is_new=self._server.fileno() != inherited)
        self._is_stopping = self._leaves = self._is_unboosted = False
        self._alive_at = time.monotonic()
        self._said = self._prepare_failed = ""

    def _keep(self, settings: Settings, *, is_new: bool) -> None:
        """Have kept what the next service needs if this one ends or dies: the settings, and where clients wait."""
        try:
            if is_new:
                self._keeper.replace(_CONTROL, self._server.fileno())
            former_settings.leave(settings, self._keeper)
        except KernelError as error:
            self._log.warning(str(error))

    def run(self) -> int:
        """Serve until a signal comes, then drain, and return the exit status."""
        with _signals(self._selector, self._stop):
            self._prepare()
            self._registry.start()
            self._notifier.ready()
            self._log.info("serving", domid=self._registry.domid)
            if self._complaint:
                self._log.error("the settings cannot be used, those of the service before hold", reason=self._complaint)
            while not (self._is_stopping and not self._registry.vbds):
                self._turn()
        self._close()
        return 0

    def _turn(self) -> None:
        is_busy = self._registry.turn()
        self._server.turn()
        if not is_busy and not self._is_stopping:
            self._prepare()
            self._unboost()
        self._tell_systemd()
        for key, _ in self._selector.select(0 if is_busy else self._sleep_s()):
            # One callback may have let go of what another descriptor of this round stood for.
            if self._selector.get_map().get(key.fd) is key:
                key.data()

    def _sleep_s(self) -> float | None:
        if self._is_stopping and not self._registry.vbds:
            return 0
        times = [self._registry.next_deadline(), self._server.next_deadline()]
        if self._notifier.interval_s is not None:
            times.append(self._alive_at)
        first = min((each for each in times if each is not None), default=None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _tell_systemd(self) -> None:
        sentence = f"serving {len(self._registry.vbds)} vbds"
        if self._complaint:
            sentence += f" by the settings of the service before: {self._complaint}"
        if sentence != self._said:
            self._said = sentence
            self._notifier.status(sentence)
        now = time.monotonic()
        if self._notifier.interval_s is not None and now >= self._alive_at:
            self._alive_at = now + self._notifier.interval_s
            self._notifier.alive()

    def _prepare(self) -> None:
        """Have what the next disk, or the next death, needs at once."""
        try:
            self._fleet.prepare(time.monotonic())
            self._prepare_failed = ""
        except KernelError as error:
            if str(error) != self._prepare_failed:
                self._log.warning(str(error))
            self._prepare_failed = str(error)

    def _unboost(self) -> None:
        """Have our turn as any other: all disks have been looked at, and whoever died has a successor."""
        if not self._is_unboosted:
            self._is_unboosted = True
            process.unboost(os.getpid())

    def _stop(self, signals: bytes) -> None:
        if self._is_stopping:
            return
        self._leaves = leaves = self._keeper.is_there and signal.SIGINT not in signals
        self._log.info("stopping", vbds=len(self._registry.vbds), workers="go on" if leaves else "are drained")
        self._notifier.stopping()
        self._is_stopping = True
        self._registry.stop(leaves=leaves)

    def _close(self) -> None:
        self._registry.tidy()
        self._fleet.close()
        if not self._leaves:
            with suppress(KernelError):
                self._keeper.forget(_CONTROL)
        self._server.close(leaves=self._leaves)
        self._store.close()
        self._selector.close()
        self._log.info("stopped")

    def _answer(self, request: dict[str, Any], reply: Reply) -> None:
        """Do what a client of the control socket asks."""
        try:
            match request:
                case {"verb": "ping"}:
                    reply({"data": {"pid": os.getpid()}})
                case {"verb": "status"}:
                    reply({"data": [describe(vbd) for _, vbd in sorted(self._registry.vbds.items())]})
                case {"verb": "hotplug", "action": "add", "path": str(path)}:
                    self._registry.hotplug(path, reply)
                case {"verb": str(verb), "vbd": str(vbd)} if verb in ORDERS:
                    if verb == "upgrade":
                        self._fleet.close()  # it has imported the program as it was
                    give(self._registry.find(vbd).orders, verb, request, reply)
                case {"verb": "stop"}:
                    self._stop(bytes([signal.SIGINT]))
                    reply({"data": {"pid": os.getpid()}})
                case {"verb": "command", "vbd": str(vbd), "layer": str(layer), "command": str(verb)}:
                    arguments = _arguments(request)
                    self._registry.find(vbd).command(layer, verb, arguments, reply)
                case _:
                    reply(
                        {
                            "error": "unknown request; the verbs are ping, status, stop, hotplug with action and path, "
                            f"command with vbd, layer, command, and with a vbd {', '.join(ORDERS)}"
                        }
                    )
        except XenbackendError as error:
            reply({"error": str(error)})


def _arguments(request: dict[str, Any]) -> list[str]:
    arguments = request.get("arguments", [])
    if not isinstance(arguments, list) or not all(isinstance(each, str) for each in arguments):
        raise ConfigError("the arguments of a command are a list of texts")
    return arguments


@contextmanager
def _signals(selector: selectors.BaseSelector, stop: Callable[[bytes], None]) -> Iterator[None]:
    """Call `stop` from the loop, with the signals' numbers, when a signal comes that ends the service."""

    def note(_number: int, _frame: FrameType | None) -> None:
        """Do nothing here: the wake-up descriptor brings the signal into the loop."""

    def wake() -> None:
        stop(near.recv(64))

    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    former = {number: signal.signal(number, note) for number in _SIGNALS}
    former_fd = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    selector.register(near, selectors.EVENT_READ, wake)
    try:
        yield
    finally:
        selector.unregister(near)
        signal.set_wakeup_fd(former_fd)
        for number, handler in former.items():
            signal.signal(number, handler)
        near.close()
        far.close()


def check(settings: Settings) -> None:
    """Check all that can be checked while the operator still looks. Raises: ConfigError, StoreError."""
    check_place(settings.socket)
    with Store(settings.store or None) as store:
        store.own_domid()


def run(read: Callable[[], Settings], environment: Mapping[str, str]) -> int:
    """Serve in the foreground, by the settings that `read` returns. Raises: XenbackendError when that cannot be."""
    keeper = Keeper(environment)
    check_versions(keeper.inherited)

    def read_usable() -> Settings:
        settings = read()
        check_place(settings.socket, keeper.inherited.get(_CONTROL, -1))
        check_host(settings.host)
        return settings

    settings, complaint = former_settings.choose(read_usable, keeper)
    log.configure(settings.log, settings.log_level)
    return Service(settings, Notifier(environment), keeper, complaint).run()


def run_detached(
    settings: Settings, arguments: Sequence[str], environment: Mapping[str, str], pid_file: Path, log_file: Path
) -> int:
    """Check, then become a daemon that runs the service with these arguments, and again should it die.

    Raises: XenbackendError while the operator still looks.
    """
    settings = _with_whole_paths(settings)
    check(settings)
    _check_pid_file(pid_file)
    from daemon import DaemonContext  # only here: who stays in the foreground does not need it

    try:
        stream = log_file.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise ConfigError(f"{log_file}: cannot write the log there: {error.strerror}") from None
    with DaemonContext(pidfile=_pid_file(pid_file), stdout=stream, stderr=stream, umask=0o077, signal_map={}):
        try:
            return parent.run(["run", *arguments], settings.socket, environment)
        except XenbackendError as error:
            log.get_logger("service").error(str(error))
            sys.exit(1)


def _with_whole_paths(settings: Settings) -> Settings:
    """Return settings that mean the same from a daemon's directory, which is the root."""
    store = str(Path(settings.store).absolute()) if settings.store else ""
    return replace(settings, store=store, socket=str(Path(settings.socket).absolute()))


def _check_pid_file(path: Path) -> None:
    """Raise ConfigError when the file cannot be written, or names a service that runs."""
    try:
        with path.open("a+", encoding="ascii", errors="replace") as file:
            file.seek(0)
            pid = file.read(20).strip()
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the pid there: {error.strerror}") from None
    with suppress(OSError):  # no such process: the file was left behind
        if pid.isdecimal() and b"xenbackend" in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise ConfigError(f"{path}: another xenbackend service runs as process {pid}")


def _pid_file(path: Path) -> AbstractContextManager[None]:
    @contextmanager
    def hold() -> Iterator[None]:
        path.write_text(f"{os.getpid()}\n", encoding="ascii")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    return hold()
