"""Opens the files of one job, by the rules of its chains: looks each name up once, and prefers files that were kept.

Must not know a process or a socket: `main` talks to supervisor and worker.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from xenbackend.block.driver import Found
from xenbackend.block.files import UNNAMED
from xenbackend.block.mapped.parents import PARENT
from xenbackend.block.servers import Account
from xenbackend.errors import DriverError, KernelError, printable
from xenbackend.kernel import locks, openat
from xenbackend.kernel.identity import difference, from_text
from xenbackend.kernel.inuse import InUse
from xenbackend.opener import marks, parents, steps
from xenbackend.opener.rules import Rule, Rules, Server
from xenbackend.protocol.jobs import HeldFile, Job, KeptFile
from xenbackend.protocol.opening import MAX_NAMES, MAX_REFUSED, Facts, Opened

# Hands over a file that was looked up, with a descriptor of it, which is lent for the call. Returns a sentence if the
# worker may not have it.
Tell = Callable[[Opened, int], str]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Held:
    fd: int  # O_PATH
    identity: str


class Access:
    """The files of one job. Each name that a chain leads to means the same file for as long as this object lives."""

    def __init__(self, job: Job, kept: Mapping[str, int], tell: Tell) -> None:
        """`kept` are O_PATH descriptors by name, ours from now on. Raises: ChainError."""
        self._job = job
        self._tell = tell
        self._rules = [Rules(text, read_only=job.read_only, shareable=job.shareable) for text in job.chains]
        identities = {each.name: each for each in job.kept}
        self._kept = {name: _Held(fd, identities[name].identity) for name, fd in kept.items()}
        self._held: list[dict[str, _Held]] = [{} if number else dict(self._kept) for number in range(len(job.chains))]
        self._led: dict[tuple[int, str, str], str] = {}  # by which act, by chain, image and the path it led to
        self._refused = 0  # questions about what an image names
        self._stand_ins: dict[tuple[str, int], _Held] = {}  # files that stand for record files, by name and chain

    def look(self, name: str, chain: int) -> Facts:
        """Return what a file is. Raises: DriverError, OSError."""
        return self._with_held(name, chain, partial(self._facts, name), create=False)

    def find(self, what: str, named_by: str, names: list[str], chain: int) -> Found:
        """Return the file that an image names, if it may be followed there, as `parents.find`. Raises: DriverError.

        If the disk is served from a file of that name already, it is that file, whatever the name means by now. After
        MAX_REFUSED refusals nothing is looked for any more: each one tells what is at a path of the host.
        """
        if self._refused >= MAX_REFUSED or len(names) > MAX_NAMES:
            problem = f"more than {MAX_REFUSED} refused files, or {MAX_NAMES} names of one, were to be looked for"
            raise DriverError(problem, path=named_by, errno=errno.EACCES)
        rules = self._chain(chain)
        rule = rules.of(named_by)
        named = parents.Named(what, named_by, names, rule.places_for(what))
        child = self._hold(named_by, chain, create=False)
        former = self._led_before(named, chain)
        try:
            allowed = parents.find(child.fd, named, self._job.parents, self._is_in_service)
        except (DriverError, OSError):
            if not former:
                self._refused += 1
                raise
            found = Found(former, parents.IN_SERVICE)
        else:
            try:
                found = self._take(child, what, allowed, former, chain)
            finally:
                os.close(allowed.fd)
        rules.allow(found.path, named_by)
        self._led[chain, named_by, found.path] = found.by
        return found

    def open(
        self, name: str, chain: int, *, write: bool, create: bool, claims: bool, stands_in: bool = False
    ) -> tuple[int, Facts]:
        """Return a descriptor of a new open file description, as `steps.reopen`, and the facts of its file.

        The caller closes it. `stands_in`: as in `OpenFile`. Raises: DriverError, OSError.
        """
        rule = self._chain(chain).of(name)
        if (write and not rule.may_write) or (create and not rule.is_record):
            problem = f"{printable(name)} may only be read"
            raise DriverError(problem, path=name, errno=errno.EACCES)
        if write and not (claims or rule.is_shared or rule.is_record):
            problem = f"{printable(name)} must not be written to by others at the same time"
            raise DriverError(problem, path=name, errno=errno.EACCES)

        def reopen(held: _Held) -> tuple[int, Facts]:
            fd = steps.reopen(held.fd, name, write=write, claims=claims)
            try:
                self._check_medium(name, chain, held, fd)
                return fd, self._facts(name, held)
            except BaseException:
                os.close(fd)
                raise

        if create and stands_in and chain:
            self._let_stand_in(name, chain)
        elif create and (former := self._stand_ins.pop((name, chain), None)):
            os.close(former.fd)
        return self._with_held(name, chain, reopen, create=create)

    def is_used_beside(self, name: str, chain: int, access: locks.Access) -> bool:
        """Return whether a file is in use by another face, as `steps.is_used_beside`. Raises: DriverError, OSError."""
        return steps.is_used_beside(self._hold(name, chain, create=False).fd, name, access)

    def why_in_use(self, name: str, chain: int, access: locks.Access, *, is_claimed: bool, with_names: bool) -> InUse:
        """Return the error for a file that somebody else uses, as `steps.why_in_use`. Raises: DriverError, OSError."""
        held = self._hold(name, chain, create=False)
        return steps.why_in_use(held.fd, name, access, is_claimed=is_claimed, with_names=with_names)

    def check_names(self) -> None:
        """Refuse to go on if a name in the text of the chain in service no longer means the file in service.

        Following that name later, to an image's parent, would lead to the other file. Raises: DriverError.
        """
        for name in self._chain(0).images:
            held = self._held[0].get(name)
            if held is None:
                continue
            try:
                fd = steps.hold(name)
            except OSError as error:
                problem = f"{printable(name)} no longer leads to the file in service: {error.strerror}"
            else:
                try:
                    differs = _differ(held.identity, steps.identify(fd))
                finally:
                    os.close(fd)
                problem = f"{printable(name)} is not the file in service: {differs}" * bool(differs)
            if problem:
                advice = (
                    "give the file in service its name back first: the new image would find its parent by that name"
                )
                raise DriverError(f"{problem}; {advice}", path=name, errno=errno.ESTALE)

    def mark_child(self, child: int) -> bool:
        """Mark a new image with its parent, the image in service, and that parent with the file that has its data.

        Returns False if they cannot be marked. Raises: DriverError, OSError, KernelError.
        """
        files = self._chain(0).source
        if not files or not marks.mark_parents(child, [self._describe(files[0])]):
            return False
        parent, *data = files
        held = self._hold(parent, 0, create=False)
        return not data or marks.mark_files(held.fd, [self._describe(each) for each in data])

    def server(self, name: str, chain: int) -> Server:
        """Return a server that may be connected to. Raises: DriverError."""
        return self._chain(chain).server(name)

    def check_key(self, source: str, chain: int) -> None:
        """Check that keys may be made of the passphrase at `source`. Raises: DriverError."""
        self._chain(chain).check_key(source)

    def credentials(self, directory: str, chain: int) -> str:
        """Return a directory if its certificates may be read. Raises: DriverError, if not."""
        return self._chain(chain).credentials(directory)

    def account(self, conf: str, user: str, chain: int) -> Account:
        """Return the account of a cluster if its settings may be read. Raises: DriverError, if not."""
        return self._chain(chain).account(Account(conf, user))

    def resolve(self, name: str, chain: int) -> str:
        """Return the directory of a file with all links followed. Raises: DriverError."""
        rules = self._chain(chain)
        if name != self._job.makes:
            rules.of(name)
        return steps.resolve(name)

    def close(self) -> None:
        """Close all descriptors."""
        held = [each for names in (self._kept, *self._held) for each in names.values()]
        for fd in {each.fd for each in (*held, *self._stand_ins.values())}:
            os.close(fd)
        self._kept.clear()
        self._held.clear()
        self._stand_ins.clear()

    def _led_before(self, named: parents.Named, chain: int) -> str:
        """Return which of the paths that an image names it has led to, even if no file is there now; else empty."""
        kept = self._kept if self._job.keeps or not chain else {}
        for path in (path for both in parents.paths_of(named) for path in reversed(both)):
            if (chain, named.image, path) in self._led or (path in kept and not self._chain(chain).is_said(path)):
                return path
        return ""

    def _take(self, child: _Held, what: str, allowed: parents.Allowed, former: str, chain: int) -> Found:
        """Return the file that an image is followed to, which is held from now on. Raises: DriverError."""
        held, identity = self._held[chain], steps.identify(allowed.fd)
        path = former or allowed.path
        if path not in held and self._stays(path, chain):
            held[path] = self._take_kept(path, chain)
        if path not in held:
            held[path] = self._take_over(path, chain, os.dup(allowed.fd), identity)
        elif _differ(held[path].identity, identity):
            if former:
                return Found(former, parents.IN_SERVICE)
            if stat.S_ISBLK(os.fstat(held[path].fd).st_mode):  # held by its node: compared once it is open
                return Found(path, allowed.by)
            raise DriverError(
                f"{printable(path)} has been replaced by another file meanwhile", path=path, errno=errno.ESTALE
            )
        if allowed.by == parents.IN_SERVICE and self._is_of_last_release(allowed.fd):
            marks.add(child.fd, marks.PARENT if what == PARENT else marks.FILES, marks.describe(allowed.fd, path))
        return Found(path, allowed.by)

    def _is_in_service(self, fd: int) -> bool:
        """Return whether the disk is served from a file already. Raises: OSError, KernelError."""
        if self._is_of_last_release(fd):
            return True
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # looking at a device would open it
            return False
        identity = steps.identify(fd)
        return any(not _differ(each.identity, identity) for each in self._kept.values())

    def _is_of_last_release(self, fd: int) -> bool:
        return any(_is_known(each, fd) for each in self._job.in_service)

    def _describe(self, name: str) -> marks.Marked:
        return marks.describe(self._hold(name, 0, create=False).fd, name)

    def _check_medium(self, name: str, chain: int, held: _Held, fd: int) -> None:
        """Ask the supervisor about a device that is not the one that was held by its node. Raises: DriverError."""
        identity = steps.identify(fd)
        if not _differ(held.identity, identity):
            return
        again = os.dup(held.fd)
        try:
            self._check_told(Opened(name, identity, chain), again)
        finally:
            os.close(again)

    def _check_told(self, found: Opened, fd: int) -> None:
        """Tell the supervisor of a file, which is behind `fd`. Raises: DriverError, if the worker may not have it."""
        if refusal := self._tell(found, fd):
            raise DriverError(refusal, path=found.name, errno=errno.ESTALE)

    def _chain(self, number: int) -> Rules:
        if not 0 <= number < len(self._rules):
            raise DriverError(f"the job has no chain {number}", errno=errno.EINVAL)
        return self._rules[number]

    def _hold(self, name: str, chain: int, *, create: bool) -> _Held:
        rule = self._chain(chain).of(name)
        held = self._stand_ins.get((name, chain)) or self._held[chain].get(name)
        if held is None:
            held = self._held[chain][name] = self._look_up(name, chain, rule, create=create)
        return held

    def _with_held(self, name: str, chain: int, use: Callable[[_Held], _T], *, create: bool) -> _T:
        """Return what `use` makes of a file. A kept one that its server does not know any more is looked up again.

        Raises: DriverError, OSError; ESTALE, if the name does not lead to it either.
        """
        held = self._hold(name, chain, create=create)
        try:
            return use(held)
        except (OSError, KernelError) as error:
            if error.errno != errno.ESTALE:
                raise
        return use(self._hold_again(name, chain, held))

    def _hold_again(self, name: str, chain: int, former: _Held) -> _Held:
        """Return a kept file once more, by its name.

        Raises: DriverError, if the name means another file; OSError with ESTALE, if no file is found.
        """
        lost = OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        if name == UNNAMED or former is not self._kept.get(name):
            raise lost
        is_record = self._chain(chain).of(name).is_record
        try:
            fd = steps.hold_record(name, create=False) if is_record else steps.hold(name)
        except (OSError, DriverError) as error:
            raise lost from error
        try:
            held = _Held(fd, steps.identify(fd))
            self._check_told(Opened(name, held.identity, chain, is_again=True), fd)
            if _differ(former.identity, held.identity):  # a chain that is being put in may have it, but by another step
                raise lost
        except KernelError as error:
            os.close(fd)
            raise lost from error
        except BaseException:
            os.close(fd)
            raise
        for names in [self._kept, *self._held]:
            if names.get(name) is former:
                names[name] = held
        os.close(former.fd)
        return held

    def _let_stand_in(self, name: str, chain: int) -> None:
        """Have another file stand for a record file, if that would be made. Raises: DriverError, OSError."""
        is_known = name in (UNNAMED, self._job.names_unnamed) or self._stays(name, chain)
        if is_known or (name, chain) in self._stand_ins or name in self._held[chain]:
            return
        fd, stands_in = steps.hold_record_or_stand_in(name, is_in_service=name in self._kept)
        if stands_in:
            self._stand_ins[name, chain] = self._take_over(name, chain, fd, "")
        else:
            self._held[chain][name] = self._take_over(name, chain, fd, "")

    def _look_up(self, name: str, chain: int, rule: Rule, *, create: bool) -> _Held:
        """Return the file that a name means now, once the supervisor keeps it."""
        if self._stays(name, chain):
            return self._take_kept(name, chain)
        if rule.is_unnamed:
            fd = self._hold_unnamed(chain)
        elif rule.is_record:
            if chain and name == self._job.names_unnamed:
                self._name_unnamed()
            fd = steps.hold_record(name, create=create)
        else:
            fd = steps.hold(name)
        return self._take_over(name, chain, fd, "")

    def _hold_unnamed(self, chain: int) -> int:
        """Return a descriptor of the disk's unnamed file, which is made if there is none. Raises: DriverError."""
        kept = self._kept.get(UNNAMED)
        if kept is None or (chain and self._job.renews_unnamed):
            return steps.hold_unnamed(self._job.scratch)
        return os.dup(kept.fd)

    def _name_unnamed(self) -> None:
        """Give the unnamed file of the chain in service the name that the job has for it. Raises: DriverError."""
        kept = self._kept.get(UNNAMED)
        if kept is None:
            raise DriverError("the disk has no unnamed file", path=self._job.names_unnamed, errno=errno.ENOENT)
        steps.give_name(kept.fd, self._job.names_unnamed)

    def _facts(self, name: str, held: _Held) -> Facts:
        return steps.look(held.fd, self._job.scratch if name == UNNAMED else name)

    def _stays(self, name: str, chain: int) -> bool:
        """Return whether a name of another chain means a kept file, whatever it means now."""
        return bool(chain and self._job.keeps and name in self._kept)

    def _take_kept(self, name: str, chain: int) -> _Held:
        """Return a kept file, once the supervisor knows that another chain has it, too. Raises: DriverError."""
        kept = self._kept[name]
        return self._take_over(name, chain, os.dup(kept.fd), kept.identity)

    def _take_over(self, name: str, chain: int, fd: int, identity: str) -> _Held:
        """Return the file behind `fd`, ours from now on, once the supervisor keeps it. Raises: DriverError."""
        try:
            identity = identity or steps.identify(fd)
            self._check_told(Opened(name, identity, chain), fd)
        except BaseException:
            os.close(fd)
            raise
        kept = self._kept.get(name)
        if kept is not None and not _differ(kept.identity, identity):
            os.close(fd)
            return kept
        return _Held(fd, identity)


def kept_of(job: Job, fds: list[int]) -> dict[str, int]:
    """Return the descriptors of a job's kept files by name. Raises: ValueError, if their numbers differ."""
    names: list[KeptFile] = job.kept
    return {each.name: fd for each, fd in zip(names, fds, strict=True)}


def _differ(one: str, other: str) -> str:
    """Return how two identities differ; empty if they do not."""
    return difference(from_text(one), from_text(other))


def _is_known(known: HeldFile, fd: int) -> bool:
    """Return whether a descriptor is of a file that a worker of the last release had open. Raises: OSError.

    The device of a file may differ from that of its mount (btrfs): then the path decides.
    """
    status = os.fstat(fd)
    if known.inode != status.st_ino:
        return False
    return known.device == status.st_dev or known.path == openat.path_of(fd)
