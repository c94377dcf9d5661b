"""All vbds of this service: finds them by watches, and looks at what has changed.

Must not know what a state means.

A place in xenstore, which is a backend's directory, has one vbd or none. A vbd that is over says so, and gets nothing
from then on. Only then is the place looked at again, and waiting hotplug scripts are brought to the vbd that is found.
A watch event is only a hint to look, so no flood of events makes anything grow, and a guest's flood is braked. The cost
of handling one vbd does not depend on how many there are.

If many places have to be looked at together, as at the start, the loop handles other events in between. Requests about
disks wait until all disks that were there at the start have been found (`when_found`).

A bug of ours while one vbd is handled is reported (`Reactor.bug`) and affects only that vbd. `Takeover` says what is
done about a bug over what an earlier service has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import Any

from xenbackend.errors import ConfigError, StoreError, is_shortage
from xenbackend.log import get_logger
from xenbackend.protocol.answers import Answer, Reply
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service.brake import PAUSE_S, Brake
from xenbackend.supervisor.service.guests import Guests
from xenbackend.supervisor.service.store_link import StoreLink
from xenbackend.supervisor.service.takeover import Taken, Takeover
from xenbackend.supervisor.service.vbds import Vbds
from xenbackend.supervisor.service.xentop import KIND, Xentop, XentopUpdates
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.inheritance import What
from xenbackend.supervisor.vbd.spec import is_ours
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.vbd.vbd_nodes import forget_notes
from xenbackend.supervisor.xenstore.nodes import private
from xenbackend.supervisor.xenstore.paths import (
    VbdPath,
    domain_path,
    parse_backend_path,
    parse_domain_directory,
    status_root,
)

_Where = VbdPath | tuple[str, int]  # a vbd's place, or that of all vbds of a kind that a domain has
Make = Callable[[VbdPath, Context, Mapping[What, int] | None, Callable[[Vbd], None]], Vbd]

_BRAKED = "its guest writes to xenstore all the time; what it writes is only looked at now and then"
RETRY_S = 1.0  # after a vbd could not be taken into service
TURN_S = 0.02  # of each pass of the loop, for looking at places
_AGAIN_S = 0.05  # until the next check whether all is found
_TOKEN = "vbds"  # noqa: S105 - a watch's token


class Registry:
    """The vbds by path."""

    def __init__(
        self,
        context: Context,
        make: Make,
        *,
        xentop: Xentop | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`make` makes a vbd; `on_change` is called whenever there is one more or less. Raises: StoreError."""
        self.vbds = Vbds()
        self.domid = context.store.own_domid()
        self._context = context
        self._make = make
        self._on_change = on_change
        self._loop = context.loop
        self._store = context.store
        self._guests = Guests(self._store.address, self._loop.now)
        self._log = get_logger("supervisor")
        self._takeover = Takeover(context, self.domid, self._add, self._free)
        self._candidates: dict[VbdPath, None] = {}
        self._changed_domains: dict[tuple[str, int], None] = {}
        self._must_scan = True
        self._scripts: dict[VbdPath, list[Reply]] = {}  # to be brought to the vbd in this place
        self._failed: dict[_Where, str] = {}  # why it could not be looked at or served; tried again by the timer
        self._retry = self._loop.timer(self._try_again)
        self._xentop = XentopUpdates(self._loop, xentop, self._counters)
        self._link: StoreLink | None = None
        exempt = frozenset({_TOKEN})
        self._brake = Brake(self._loop, self._store, exempt, self._begin_to_brake, self._look_at_frontend)
        self._is_stopping = self._leaves = False
        self._is_finding = True  # not all that was there at the start has been looked at
        self._asking: deque[Callable[[], object]] = deque()  # functions to call once it has
        self._found_at = self._loop.timer(self._tell_found)

    def start(self) -> None:
        """Set watches, go on with what an earlier service left, and look soon at what is there. Raises: StoreError."""
        self._store.remove(status_root(self.domid))  # of a service that had no time to tidy up
        forget_notes(self._store, self.domid)
        self._make_status_root()
        self._watch_kinds()
        self._link = StoreLink(
            self._store, self._loop, follow=self._follow, has_work=self._has_work, on_back=self._begin_anew
        )
        self._takeover.start()

    def stop(self, *, leaves: bool = False) -> None:
        """Let every vbd finish what is in flight and close; `vbds` is empty when they have.

        With `leaves` the workers go on, for the next service to take over. A script that waits then gets no answer: it
        asks the next service once its connection is closed.
        """
        self._is_stopping, self._leaves = True, leaves
        for vbd in list(self.vbds.values()):
            if self._contained(vbd, partial(vbd.stop, leaves=leaves), default=self) is self:
                self._forget(vbd)
        self._candidates.clear()
        self._bring_scripts()

    def close(self) -> None:
        """Remove what we published about ourselves, and stop looking."""
        if self._link is not None:
            self._link.close()
        self._retry.set(None)
        self._found_at.set(None)
        self._brake.close()
        for reply in self._takeover.close():
            self._refuse(reply)
        self._bring_scripts()
        self._xentop.close()
        with suppress(StoreError):
            self._store.remove(status_root(self.domid))

    @property
    def has_taken_over(self) -> bool:
        """True once everything that an earlier service left has been taken over by vbds, or dropped."""
        return self._takeover.is_over

    def when_found(self, function: Callable[[], object]) -> None:
        """Call `function` once all disks that were there at the start have been found, in the order of these calls.

        It is called at once if they have been found, or if none will be: xenstore is away, or the service stops.
        """
        self._asking.append(function)
        self._tell_found()

    def _tell_found(self) -> None:
        if self._is_finding and self._store.is_connected and not self._is_stopping:
            self._found_at.set(self._loop.now() + _AGAIN_S)
            return
        while self._asking:
            function = self._asking.popleft()
            try:
                function()
            except Exception as bug:  # the others must still be called
                self._loop.bug(bug)

    def find(self, text: str) -> Vbd:
        """Return the vbd that a text such as ``5/xvda`` or ``guest/xvda`` names. Raises: ConfigError, StoreError."""
        with closing(self._guests):
            return self.vbds.find(text, self._guests.one_by_one())

    def names_of(self, domids: Iterable[int]) -> dict[int, str]:
        """Return the names of these domains' guests; none while xenstore does not answer."""
        return self._guests.names_of(domids)

    def braked_s(self, vbd: Vbd) -> float:
        """Return how many seconds pass between looks at a vbd whose guest writes too often; 0: it does not."""
        return self._brake.pause_s(vbd.token)

    def hotplug(self, path: str, reply: Reply) -> None:
        """Serve the vbd whose backend directory a hotplug script names; `reply` gets the answer, maybe later.

        Raises: ConfigError, if the path is no vbd's; StoreError.
        """
        found = parse_backend_path(path, self.domid)
        if self._is_stopping:
            self._refuse(reply)
            return
        if found is None or found[1]:
            raise ConfigError(f"{path[:80]!r} is not the directory of a vbd of domain {self.domid}")
        self._consider(found[0])  # the script may be faster than the watch
        self._bring(found[0], reply)

    def _has_work(self) -> bool:
        return bool(self._must_scan or self._changed_domains or self._candidates or self._scripts)

    def _follow(self) -> None:
        """Look at what has changed. Raises: StoreError."""
        found = self._store.events()
        self._brake.look()
        self._sort(found)
        if self._must_scan:
            self._scan()
        for domain in list(self._changed_domains):
            self._look_at(domain, partial(self._scan_domain, *domain))
            self._changed_domains.pop(domain, None)
        self._consider_some()
        self._bring_scripts()
        self._is_finding &= self._has_work()

    def _consider_some(self) -> None:
        """Look at places for TURN_S; the others have their turn in the next pass. Raises: StoreError."""
        end = self._loop.now() + TURN_S
        for path in list(self._candidates):
            self._look_at(path, partial(self._consider, path))
            self._candidates.pop(path, None)
            if self._loop.now() >= end:
                break

    def _look_at(self, where: _Where, look: Callable[[], None]) -> None:
        """Look at one place; if xenstore refuses only that, try it again later. Raises: StoreError if it is away."""
        former = self._failed.pop(where, "")
        try:
            look()
        except StoreError as error:
            if not self._store.is_connected:
                raise
            if str(error) != former:
                self._log.error(str(error))
            self._fail(where, str(error))

    def _begin_to_brake(self, token: str) -> None:
        """Log that a guest writes too often, once until it is calm again."""
        vbd = self.vbds.of_token(token)
        if vbd is not None:
            vbd.log.say("warning", _BRAKED, seconds=f"{PAUSE_S[1]:.0f}")

    def _watch_kinds(self) -> None:
        for kind in self._kinds():
            self._store.watch(self._kind_path(kind), _TOKEN)

    def _begin_anew(self) -> None:
        """Look at everything again, as xenstore was away. Raises: StoreError, if it refuses what nothing replaces."""
        self._watch_kinds()  # those that were refused with the connection are not set
        with suppress(StoreError):
            self._make_status_root()
        for vbd in list(self.vbds.values()):
            self._contained(vbd, vbd.doubt)

    def _sort(self, events: Iterable[tuple[str, str]]) -> None:
        for path, token in events:
            self._look_at_frontend(token)
            if token == _TOKEN:
                found = parse_backend_path(path, self.domid)
                domain = parse_domain_directory(path)
                if found is not None:
                    self._mark(found[0])
                elif domain is not None:  # other domains' vbds are not looked at, which could take long
                    self._changed_domains[domain] = None
                else:
                    self._must_scan = True

    def _look_at_frontend(self, token: str) -> None:
        """Have the vbd whose watch has this token, if any, look at its frontend."""
        vbd = self.vbds.of_token(token)
        if vbd is not None:
            self._contained(vbd, partial(vbd.look_soon, node=False, theirs=True))

    def _mark(self, path: VbdPath) -> None:
        """Have a place looked at soon: by its vbd, or, if it has none, for a new one."""
        vbd = self.vbds.get(path)
        if vbd is not None:
            self._contained(vbd, partial(vbd.look_soon, node=True, theirs=False))
        elif not self._is_stopping and path.kind in self._context.settings.kinds:
            self._candidates[path] = None

    def _scan(self) -> None:
        """Look at every vbd that there is or was."""
        for path in self.vbds:
            self._mark(path)
        for kind in self._kinds():
            root = self._kind_path(kind)
            found = (parse_domain_directory(f"{root}/{domid}") for domid in self._store.directory(root))
            self._changed_domains |= dict.fromkeys(each for each in found if each is not None)
        self._must_scan = False

    def _scan_domain(self, kind: str, domid: int) -> None:
        """Look at every vbd of a kind that a domain has or had."""
        for vbd in self.vbds.of_domain(domid):
            if vbd.path.kind == kind:
                self._mark(vbd.path)
        root = self._kind_path(kind)
        for devid in self._store.directory(f"{root}/{domid}"):
            found = parse_backend_path(f"{root}/{domid}/{devid}", self.domid)
            if found is not None:
                self._mark(found[0])

    def _consider(self, path: VbdPath) -> None:
        """Serve a vbd if it is ours and its place is free. Raises: StoreError."""
        if self._is_stopping or path in self.vbds or self._takeover.occupies(path):
            return
        keys = self._store.read_many(path.backend, ("script", "state"))
        settings = self._context.settings
        if "state" in keys and (settings.serve == "all" or is_ours(keys, settings.scripts)):
            self._add(path)

    def _add(self, path: VbdPath, found: Mapping[What, int] | None = None) -> Taken:
        """Take a vbd into service; if that fails, it is tried again."""
        try:
            vbd = self._make(path, self._context, found, self._forget)
        except Exception as problem:
            if is_shortage(problem):
                self._log.error(str(problem), vbd=str(path))
                self._fail(path, str(problem))
                return Taken.LATER
            problem.add_note(f"while {path} was taken into service")
            self._loop.bug(problem)
            said = f"{type(problem).__name__}: {problem}"
            self._fail(path, f"the service could not take it over, see its log: {said}")
            return Taken.NEVER
        self._failed.pop(path, None)
        if not vbd.is_forgotten:
            self.vbds.add(vbd)
            self._on_change()
            if path.kind == KIND:
                self._xentop.begin()
        return Taken.DONE

    def _fail(self, where: _Where, sentence: str) -> None:
        self._failed[where] = sentence
        if self._retry.due is None:
            self._retry.set(self._loop.now() + RETRY_S)

    def _try_again(self) -> None:
        for where in self._failed:
            if isinstance(where, VbdPath):
                self._mark(where)
            else:
                self._changed_domains[where] = None

    def _forget(self, vbd: Vbd) -> None:
        """Remove a vbd that is over."""
        if self.vbds.remove(vbd):
            self._brake.forget(vbd.token)
            self._free(vbd.path, self._contained(vbd, vbd.give_up_scripts, default=[]))
            self._on_change()

    def _free(self, path: VbdPath, scripts: list[Reply]) -> None:
        """Look again at a place that has become free: a node of that name may have been made anew."""
        if scripts:
            self._scripts.setdefault(path, []).extend(scripts)
        self._mark(path)

    def _contained(self, vbd: Vbd, function: Callable[[], Any], default: Any = None) -> Any:
        """Return what a function of one vbd returns. A bug in it is reported, and `default` returned."""
        try:
            return function()
        except Exception as bug:
            bug.add_note(f"while {vbd.path} was handled")
            self._loop.bug(bug)
            return default

    def _bring_scripts(self) -> None:
        """Bring scripts to their vbds, once their places have been looked at."""
        for path in [each for each in self._scripts if each not in self._candidates]:
            for reply in self._scripts.pop(path):
                self._bring(path, reply)

    def _bring(self, path: VbdPath, reply: Reply) -> None:
        """Bring a script to its vbd, which answers it, or answer why there is none."""
        vbd = self.vbds.get(path)
        if self._is_stopping:
            self._refuse(reply)
        elif vbd is not None:
            if self._contained(vbd, partial(vbd.hotplug, reply), default=self) is self:
                reply(Answer(Code.BUG, None, f"{path}: the service failed to do that, see its log"))
        elif self._takeover.occupies(path):
            self._takeover.wait(path, reply)
        elif path in self._failed:
            reply(Answer(Code.FAILED, None, f"{path}: {self._failed[path]}"))
        else:
            scripts = ", ".join(self._context.settings.scripts)
            sentence = f"{path} is not served: it is gone, or its key script does not name one of {scripts}"
            reply(Answer(Code.GONE, None, sentence))

    def _refuse(self, reply: Reply) -> None:
        """Tell a script that the service is stopping, unless there is a next service, which the script is to ask."""
        if not self._leaves:
            reply(Answer(Code.GONE, None, "the service is stopping"))

    def _counters(self) -> dict[VbdPath, memoryview | None]:
        """Return the counters of the disks that `xentop` shows."""
        shown = [vbd for path, vbd in self.vbds.items() if path.kind == KIND]
        return {vbd.path: self._contained(vbd, vbd.counters_page) for vbd in shown}

    def _kinds(self) -> list[str]:
        """Return the kinds to look at: those that we serve, and those of disks that an earlier service served."""
        return list(dict.fromkeys([*self._context.settings.kinds, *(path.kind for path in self._takeover.paths)]))

    def _kind_path(self, kind: str) -> str:
        return f"{domain_path(self.domid)}/backend/{kind}"

    def _make_status_root(self) -> None:
        """Make the directory for what we show of each vbd. Only we may use it and what is below it."""
        self._store.mkdir(status_root(self.domid))
        self._store.set_permissions(status_root(self.domid), private(self.domid))
