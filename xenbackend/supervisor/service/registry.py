"""All vbds of this service: finds them by watches, looks at what changed, survives a xenstore that goes away.

Must not know what a state means.

A watch event is only ever a hint to look; what has changed is one flag per vbd, so no flood of events makes this grow.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from xenbackend.disks import vdev_to_devid
from xenbackend.errors import ConfigError, KernelError, StoreError
from xenbackend.log import get_logger
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.xentop import KIND, PERIOD_S, Xentop
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.inheritance import sort_inherited
from xenbackend.supervisor.vbd.spec import is_ours
from xenbackend.supervisor.vbd.vbd import Reply, Vbd
from xenbackend.supervisor.xenstore.paths import (
    VbdPath,
    domain_path,
    parse_backend_path,
    parse_domain_directory,
)
from xenbackend.supervisor.xenstore.store import Store

_TOKEN = "vbds"  # noqa: S105 - a watch's token
_BACK_OFF_S = (0.1, 5.0)  # between tries to reconnect: at first, at most


class Registry:
    """The vbds by path."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        settings: Settings,
        selector: selectors.BaseSelector,
        now: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        bus: Bus | None = None,
        xentop: Xentop | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.vbds: dict[VbdPath, Vbd] = {}
        self.domid = store.own_domid()
        keeper = keeper or Keeper({})
        self._context = Context(store, fleet, settings, bus or Bus(), keeper, now, wall_clock)
        self._inherited = sort_inherited(keeper, self.domid)
        self._store = store
        self._selector = selector
        self._now = now
        self._log = get_logger("supervisor")
        self._candidates: dict[VbdPath, None] = {}
        self._scripts: list[tuple[VbdPath, Reply]] = []  # that came to a vbd which has gone meanwhile
        self._xentop = xentop
        self._xentop_at: float | None = None  # when it is shown the counters again
        self._xentop_failed = ""
        self._must_scan = True
        self._changed_domains: dict[tuple[str, int], None] = {}
        self._is_stopping = False
        self._back_off_s = _BACK_OFF_S[0]
        self._reconnect_at: float | None = None
        self._fd = -1

    def start(self) -> None:
        """Watch, and look at what is there with the next `turn`. Raises: StoreError."""
        self._store.remove(self._status_root())  # of a service that had no time to tidy up
        if self._xentop is not None:
            self._xentop.clear()
        for kind in self._kinds():
            self._store.watch(self._kind_path(kind), _TOKEN)
        self._listen()
        for path, found in self._inherited.items():  # also those whose node has gone meanwhile: they are closed
            self._add(path, found)
        if self._inherited:
            self._log.info("taking over from an earlier service", vbds=len(self._inherited))

    def stop(self, *, leaves: bool = False) -> None:
        """Let every vbd finish what is in flight and close; `vbds` is empty when they have.

        With `leaves` the workers go on, for the next service to take over.
        """
        self._is_stopping = True
        for vbd in list(self.vbds.values()):
            vbd.stop(leaves=leaves)
        self._drop_forgotten()

    def tidy(self) -> None:
        """Remove what we published about ourselves, and let nobody wait."""
        for path, reply in self._scripts:
            self._bring(path, reply)
        if self._xentop is not None:
            self._xentop.clear()
        with suppress(StoreError):
            self._store.remove(self._status_root())

    def turn(self) -> bool:
        """Do what is due, and return whether there was anything: events may have come meanwhile, so call again."""
        was_busy = False
        try:
            was_busy = self._follow_store()
        except StoreError as error:
            self._lose(error)
        for vbd in list(self.vbds.values()):
            was_busy |= vbd.turn()
        self._drop_forgotten()
        self._show_in_xentop()
        if not self._store.is_connected and self._reconnect_at is None:
            self._lose(StoreError(self._store.why_lost))
        return was_busy and self._store.is_connected

    def next_deadline(self) -> float | None:
        """Return when `turn` has to be called at the latest."""
        times = [self._reconnect_at, self._xentop_at, *(vbd.next_deadline() for vbd in self.vbds.values())]
        if self._reconnect_at is not None:
            times = [self._reconnect_at, self._xentop_at, *(vbd.deadline for vbd in self.vbds.values())]
        return min((each for each in times if each is not None), default=None)

    def find(self, text: str) -> Vbd:
        """Return the vbd that a text such as ``5/xvda`` or ``vbd3/5/51712`` names. Raises: ConfigError."""
        *kind, domid, vdev = ["", *text.split("/")] if "/" in text else ["", "", ""]
        for path, vbd in self.vbds.items():
            is_kind = kind[-1] in ("", path.kind)
            if is_kind and domid == str(path.frontend_domid) and vdev_to_devid(vdev) == path.devid:
                return vbd
        served = ", ".join(str(path) for path in self.vbds) or "none is served"
        raise ConfigError(f"there is no vbd {text!r}; write it as 5/xvda or vbd/5/51712 ({served})")

    def hotplug(self, path: str, reply: Reply) -> None:
        """Serve the vbd whose backend directory a hotplug script names; `reply` gets the answer, maybe later.

        Raises: ConfigError where the path is no vbd's, or the service is stopping; StoreError.
        """
        found = parse_backend_path(path, self.domid)
        if self._is_stopping:
            raise ConfigError("the service is stopping")
        if found is None or found[1]:
            raise ConfigError(f"{path[:80]!r} is not the directory of a vbd of domain {self.domid}")
        if found[0] not in self.vbds:  # the script may be faster than the watch
            self._consider(found[0])
        self._bring(found[0], reply)

    def _bring(self, path: VbdPath, reply: Reply) -> None:
        """Let a script wait for its vbd."""
        if path in self.vbds and not self._is_stopping:
            self.vbds[path].hotplug(reply)
        else:
            scripts = ", ".join(self._context.settings.scripts)
            reply({"error": f"{path} is not served: it is gone, or its key script names none of {scripts}"})

    def _show_in_xentop(self) -> None:
        """Let `xentop` see the counters of the vbds that it looks for, now and then."""
        now = self._now()
        if self._xentop is None or (self._xentop_at is not None and now < self._xentop_at):
            return
        pages = {path: page for path, vbd in self.vbds.items() if path.kind == KIND and (page := vbd.counters_page())}
        self._xentop.keep_only(pages)
        try:
            for path, page in pages.items():
                self._xentop.show(path, page)
        except KernelError as error:
            if str(error) != self._xentop_failed:
                self._log.warning(str(error))
            self._xentop_failed = str(error)
        self._xentop_at = now + PERIOD_S if pages else None

    def _follow_store(self) -> bool:
        if self._reconnect_at is not None:
            if self._now() < self._reconnect_at:
                return False
            self._reconnect()
        events = self._store.events()
        self._sort(events)
        if self._must_scan:
            self._scan()
        for kind, domid in self._changed_domains:
            self._scan_domain(kind, domid)
        self._changed_domains.clear()
        for path in list(self._candidates):
            self._consider(path)
            del self._candidates[path]
        scripts, self._scripts = self._scripts, []
        for path, reply in scripts:
            self._bring(path, reply)
        return bool(events or scripts)

    def _sort(self, events: Iterable[tuple[str, str]]) -> None:
        by_token = {vbd.token: vbd for vbd in self.vbds.values()}
        for path, token in events:
            if token in by_token:
                by_token[token].theirs_changed = True
            elif token == _TOKEN:
                found = parse_backend_path(path, self.domid)
                domain = parse_domain_directory(path)
                if found is not None:
                    self._mark(found[0])
                elif domain is not None:  # others' vbds are left alone: with many of them, to look at all takes long
                    self._changed_domains[domain] = None
                else:
                    self._must_scan = True

    def _mark(self, path: VbdPath) -> None:
        if path in self.vbds:
            self.vbds[path].node_changed = True
        elif not self._is_stopping and path.kind in self._context.settings.kinds:
            self._candidates[path] = None

    def _scan(self) -> None:
        """Look at every vbd that there is or was."""
        for vbd in self.vbds.values():
            vbd.node_changed = True
        for kind in self._kinds():
            for domid in self._store.directory(self._kind_path(kind)):
                self._mark_domain(kind, domid)
        self._must_scan = False

    def _scan_domain(self, kind: str, domid: int) -> None:
        """Look at every vbd of a kind that a domain has or had."""
        for path, vbd in self.vbds.items():
            if (path.kind, path.frontend_domid) == (kind, domid):
                vbd.node_changed = True
        self._mark_domain(kind, str(domid))

    def _mark_domain(self, kind: str, domid: str) -> None:
        root = self._kind_path(kind)
        for devid in self._store.directory(f"{root}/{domid}"):
            found = parse_backend_path(f"{root}/{domid}/{devid}", self.domid)
            if found is not None:
                self._mark(found[0])

    def _consider(self, path: VbdPath) -> None:
        """Serve a vbd if it is ours."""
        keys = self._store.read_many(path.backend, ("script", "state"))
        settings = self._context.settings
        if "state" in keys and (settings.serve == "all" or is_ours(keys, settings.scripts)):
            self._add(path)

    def _add(self, path: VbdPath, found: Mapping[str, int] | None = None) -> None:
        try:
            self.vbds[path] = Vbd(path, self._context, found)
        except KernelError as error:
            self._log.error(str(error), vbd=str(path))

    def _kinds(self) -> list[str]:
        """Return the kinds to look at: those that we serve, and those of disks that an earlier service had begun to."""
        return list(dict.fromkeys([*self._context.settings.kinds, *(path.kind for path in self._inherited)]))

    def _drop_forgotten(self) -> None:
        for path in [path for path, vbd in self.vbds.items() if vbd.is_forgotten]:
            self._scripts += [(path, reply) for reply in self.vbds.pop(path).scripts]
            # A node with the same name may have been made while the old one was closing.
            self._mark(path)

    def _lose(self, error: StoreError) -> None:
        """Take note of an error; when the connection is gone, plan the next try. Disks are served all the while."""
        reason = str(error)
        if self._store.is_connected:
            self._log.warning(str(error))
            self._store.close()  # nothing that was read before can be relied on: begin anew
        elif self._store.why_lost:
            reason = self._store.why_lost  # whoever asked first was told; that may have been a vbd
        if self._fd >= 0:
            self._selector.unregister(self._fd)
            self._fd = -1
            self._log.error("xenstore is gone; disks are served on", reason=reason)
        self._reconnect_at = self._now() + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, _BACK_OFF_S[1])

    def _reconnect(self) -> None:
        self._store.reconnect()
        self._listen()
        self._log.info("xenstore is back")
        self._reconnect_at, self._back_off_s = None, _BACK_OFF_S[0]
        for vbd in self.vbds.values():
            vbd.doubt()

    def _listen(self) -> None:
        self._fd = self._store.fileno()
        self._selector.register(self._fd, selectors.EVENT_READ, _nothing)

    def _kind_path(self, kind: str) -> str:
        return f"{domain_path(self.domid)}/backend/{kind}"

    def _status_root(self) -> str:
        return f"{domain_path(self.domid)}/xenbackend"


def _nothing() -> None:
    """Every turn of the loop looks at the store; its descriptor only has to end the sleep."""
