"""The walls of one process, raised one after the other, each to the end before the next: what is up, and what is not.

Must not be called when a second thread runs, or something still has to be opened or imported by its name: what is given
up is given up for good. Must not raise an exception for a wall that this host does not have: it says so.

The order matters. Descriptors are closed while /proc can be seen; namespaces need the capabilities that the user's
change takes; Landlock and the filter need "no new privileges"; the filter is last, as it refuses all the calls before.

**Whose user**: a process that the host knows by the number P has the user and group FIRST_USER + P, and no other
group. So two processes that live at the same time never have the same, and nobody has to remember which are taken. No
system gives these numbers to anybody: systemd's table of users (UIDS-GIDS.md) leaves them unused, and ends its
containers' users below. What a process leaves behind are descriptors of memories, which belong to who holds them.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from xenbackend.errors import KernelError, XenbackendError
from xenbackend.kernel import landlock, namespaces, privileges, seccomp
from xenbackend.walls.filter import compile_policy
from xenbackend.walls.policy import WORKER, load

MODES = ("on", "require", "off")
FIRST_USER = 0x70000000
NETWORK, FILES = "network", "files"  # what a driver may say that it needs: names of policies
_MOST_DESCRIPTORS = 4096  # memories, images, parents, clients of an export
_MOST_THREADS = 512  # of the pool, and those that the kernel starts for io_uring, which count as ours
_NOWHERE = "/dev/null"
_TABLE = "/proc/self/fd"


class Wall(StrEnum):
    """Each wall, in the order in which they are raised."""

    DESCRIPTORS = "descriptors"  # those of a list and no other; standard input, output and error lead nowhere
    ENVIRONMENT = "environment"  # empty
    PROCESSES = "processes"  # it sees no process but itself
    NAMESPACES = "namespaces"  # it sees no file, no network, no IPC object
    LIMITS = "limits"
    USER = "user"  # one that nobody else has, no groups
    CAPABILITIES = "capabilities"  # none
    PRIVILEGES = "privileges"  # no program gives it any
    DUMPS = "dumps"  # nobody but root reads its memory
    LANDLOCK = "landlock"
    CALLS = "calls"  # system calls


@dataclass(slots=True)
class Raised:
    """What became of the walls: those that are `up`, why others are not, and what was left open on purpose.

    refusal   a sentence, where they are required and not all of them are up; else empty
    """

    up: list[str] = field(default_factory=list)
    down: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    refusal: str = ""


class Walls:
    """What walls are made of; made once, by a process with one thread, for all that it forks."""

    def __init__(self, mode: str) -> None:
        """Make empty namespaces and the worker's filter; `mode` is one of MODES."""
        self.mode = mode
        self._empty: namespaces.EmptySet | None = None
        self._why_no_empty = KernelError("make empty namespaces", errno.ENOSYS)
        self._programs: dict[tuple[str, ...], bytes] = {}
        if mode == "off":
            return
        with suppress(XenbackendError):  # another machine: the wall is missing, and says why
            self._program(())
        try:
            self._empty = namespaces.EmptySet()
        except KernelError as error:
            self._why_no_empty = error

    def number_anew(self) -> str:
        """Let the next child see no process but itself; return why not, empty where it will, or is not wanted."""
        if self.mode == "off":
            return ""
        try:
            namespaces.number_processes_anew()
        except KernelError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Let go of what walls are made of: whoever is behind them needs none of it."""
        if self._empty is not None:
            self._empty.close()
            self._empty = None

    def begin(self, keeps: Sequence[int], needs: Iterable[str] = ()) -> Raised:
        """Raise the first walls: have nothing open but `keeps`, and no environment. What is opened from here on stays.

        Args:
            keeps: the descriptors that stay; not 0, 1, 2.
            needs: what is left open (NETWORK, FILES).
        """
        raised = Raised(needs=sorted(set(needs)))
        if self.mode == "off":
            return raised
        with suppress(XenbackendError):  # while its files can be read; what is wrong with them is told of the wall
            self._program(tuple(raised.needs))
        besides = self._empty.descriptors if self._empty else ()
        self.raise_one(Wall.DESCRIPTORS, raised, lambda: _keep_only(keeps, besides))
        self.raise_one(Wall.ENVIRONMENT, raised, os.environ.clear)
        return raised

    def raise_all(self, pid: int, raised: Raised, *, why_not_alone: str | None = None) -> None:
        """Raise all others around this process, and add to `raised` what became of each.

        Args:
            pid: our number, as the host knows it.
            raised: what `begin` returned.
            why_not_alone: why we see other processes: empty where we do not, None where nobody tried.
        """
        if self.mode == "off":
            return
        needs = tuple(raised.needs)
        if why_not_alone is not None:
            self.raise_one(Wall.PROCESSES, raised, lambda: _fail(why_not_alone))
        self.raise_one(Wall.NAMESPACES, raised, lambda: self._enter(needs))
        self.raise_one(Wall.LIMITS, raised, _limit)
        self.raise_one(Wall.USER, raised, lambda: privileges.become(FIRST_USER + pid))
        self.raise_one(Wall.CAPABILITIES, raised, privileges.drop_capabilities)
        self.raise_one(Wall.PRIVILEGES, raised, privileges.refuse_new_privileges)
        self.raise_one(Wall.DUMPS, raised, privileges.refuse_dumps)
        reading = FILES in needs
        self.raise_one(Wall.LANDLOCK, raised, lambda: landlock.restrict(network=NETWORK in needs, reading=reading))
        self.raise_one(Wall.CALLS, raised, lambda: seccomp.load(self._program(needs)))
        if self.mode == "require" and raised.down:
            raised.refusal = f'walls = "require", and this host cannot raise {describe(raised.down)}'

    def raise_one(self, wall: Wall, raised: Raised, step: Callable[[], None]) -> None:
        """Raise one wall, and add to `raised` what became of it."""
        try:
            step()
        except (XenbackendError, OSError, ValueError) as error:
            raised.down[wall.value] = str(error)
        else:
            raised.up.append(wall.value)

    def _program(self, needs: tuple[str, ...]) -> bytes:
        if needs not in self._programs:
            self._programs[needs] = compile_policy(load((WORKER, *needs)), platform.machine())
        return self._programs[needs]

    def _enter(self, needs: Iterable[str]) -> None:
        if self._empty is None:
            raise self._why_no_empty
        but = 0
        if NETWORK in needs:
            but |= namespaces.NETWORK
        if FILES in needs:
            but |= namespaces.FILES
        try:
            self._empty.enter(but=but)
        finally:
            self.close()


def describe(down: Mapping[str, str]) -> str:
    """Return which walls are not up, and why, for people; the same reason once."""
    reasons: dict[str, list[str]] = {}
    for wall, why in down.items():
        reasons.setdefault(why, []).append(wall)
    return "; ".join(f"{', '.join(walls)} ({why})" for why, walls in reasons.items())


def _fail(why: str) -> None:
    if why:
        raise OSError(why)


def _keep_only(keeps: Sequence[int], besides: Sequence[int]) -> None:
    """Close every descriptor but these, let 0, 1 and 2 lead nowhere, and look at what is left.

    `besides` are still needed, and closed by who needs them.
    """
    nowhere = os.open(_NOWHERE, os.O_RDWR | os.O_CLOEXEC)
    for standard in range(3):
        os.dup2(nowhere, standard)
    allowed = {0, 1, 2, *keeps, *besides}
    for fd in _open_descriptors() - allowed:
        os.close(fd)
    left = _open_descriptors()
    if not left <= allowed:
        raise OSError(f"descriptors {sorted(left - allowed)} are open that should not be")


def _open_descriptors() -> set[int]:
    with os.scandir(_TABLE) as entries:
        found = {int(entry.name) for entry in entries}
    return {fd for fd in found if _is_open(fd)}  # the table's own descriptor is in it


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _limit() -> None:
    """Bound what the kernel counts for us. Not the address space: `ram:` and dirty maps may be as large as a disk."""
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MOST_DESCRIPTORS),
        (resource.RLIMIT_NPROC, _MOST_THREADS),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NICE, 0),
        (resource.RLIMIT_RTPRIO, 0),
    ):
        limit = most if (hard := resource.getrlimit(kind)[1]) == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limit, limit))
