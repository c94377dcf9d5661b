"""Raises the walls of one process in a fixed order, and reports which are up and which are not.

Must not be called while a second thread runs, or before everything has been opened and imported that is needed by
name: rights are given up for good. Must not raise an exception for a wall that this host cannot raise: it is reported.

The order matters. Descriptors are closed while /proc is visible. Namespaces need capabilities that are lost with the
change of user. Landlock and the filter need "no new privileges". The filter is last, since it refuses all the calls by
which the others are raised.

**User numbers**: a process whose number on the host is P gets the user and group FIRST_USER + P, and no other group. So
two processes that live at the same time never have the same user, and nobody has to remember which numbers are taken.
No system gives these numbers to other users: systemd's table of users (UIDS-GIDS.md) leaves them unused, and the range
of its containers' users ends below. A process leaves no files of its user behind, only memories, by descriptors that
other processes hold.
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
NETWORK, FILES = "network", "files"  # needs that a driver may declare: names of policies
_MOST_DESCRIPTORS = 4096  # for memories, images, parents, clients of an export
_MOST_THREADS = 512  # of the pool, and kernel threads of io_uring, which count as ours
_NOWHERE = "/dev/null"
_TABLE = "/proc/self/fd"


class Wall(StrEnum):
    """Each wall, in the order in which they are raised. Another one needs a new `protocol.messages.VERSION`."""

    DESCRIPTORS = "descriptors"  # only those of a list are open; standard input, output and error are /dev/null
    ENVIRONMENT = "environment"  # empty
    PROCESSES = "processes"  # it sees no process but itself
    NAMESPACES = "namespaces"  # it sees no file, no network, no IPC object
    LIMITS = "limits"
    USER = "user"  # one that no other process has, without supplementary groups
    CAPABILITIES = "capabilities"  # none
    PRIVILEGES = "privileges"  # no program that it starts can gain any
    DUMPS = "dumps"  # only root can read its memory
    LANDLOCK = "landlock"
    CALLS = "calls"  # system calls


@dataclass(slots=True)
class Raised:
    """The result of raising walls.

    up        names of the walls that are up
    down      name of each wall that is not up, and the reason
    needs     the needs of drivers for which gaps were left on purpose
    refusal   a sentence if all walls are required and some are not up, else empty
    """

    up: list[str] = field(default_factory=list)
    down: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    refusal: str = ""


class Walls:
    """The materials of walls: made once, by a process with one thread, for all processes that it forks."""

    def __init__(self, mode: str) -> None:
        """Make empty namespaces and the worker's filter; `mode` is one of MODES."""
        self.mode = mode
        self._empty: namespaces.EmptySet | None = None
        self._why_no_empty = KernelError("make empty namespaces", errno.ENOSYS)
        self._programs: dict[tuple[str, ...], bytes] = {}
        if mode == "off":
            return
        with suppress(XenbackendError):  # unknown architecture: raising the wall will report why
            self._program(())
        try:
            self._empty = namespaces.EmptySet()
        except KernelError as error:
            self._why_no_empty = error

    def new_pid_namespace(self) -> str:
        """Make the next child see no process but itself. Return why that fails; empty if it works or is not wanted."""
        if self.mode == "off":
            return ""
        try:
            namespaces.new_pid_namespace()
        except KernelError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Release the materials; a process behind its walls no longer needs them."""
        if self._empty is not None:
            self._empty.close()
            self._empty = None

    def begin(self, keeps: Sequence[int], needs: Iterable[str] = ()) -> Raised:
        """Raise the first walls: close all descriptors but `keeps`, and clear the environment.

        Descriptors that are opened afterwards stay open.

        Args:
            keeps: the descriptors that stay open, without 0, 1 and 2.
            needs: needs for which gaps are left: NETWORK, FILES, or the name of another policy.
        """
        raised = Raised(needs=sorted(set(needs)))
        if self.mode == "off":
            return raised
        with suppress(XenbackendError):  # while policy files can be read; raising the wall reports errors
            self._program(tuple(raised.needs))
        besides = self._empty.descriptors if self._empty else ()
        self.raise_one(Wall.DESCRIPTORS, raised, lambda: _keep_only(keeps, besides))
        self.raise_one(Wall.ENVIRONMENT, raised, os.environ.clear)
        return raised

    def raise_all(self, pid: int, raised: Raised, *, why_not_alone: str | None = None) -> None:
        """Raise all other walls around this process, and add each result to `raised`.

        Args:
            pid: our process number on the host.
            raised: the value that `begin` returned.
            why_not_alone: why we see other processes; empty if we do not, None if it was not tried to hide them.
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
        """Raise one wall by calling `step`, and add the result to `raised`."""
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
    """Return in words which walls are not up, and why; walls with the same reason are listed together."""
    reasons: dict[str, list[str]] = {}
    for wall, why in down.items():
        reasons.setdefault(why, []).append(wall)
    return "; ".join(f"{', '.join(walls)} ({why})" for why, walls in reasons.items())


def _fail(why: str) -> None:
    if why:
        raise OSError(why)


def _keep_only(keeps: Sequence[int], besides: Sequence[int]) -> None:
    """Close all descriptors but these, redirect 0, 1 and 2 to /dev/null, and check the result. Raises: OSError.

    `besides` are still needed, and their users close them later.
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
    return {fd for fd in found if _is_open(fd)}  # not the one by which the table was read, which is closed by now


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _limit() -> None:
    """Set resource limits, but not for the address space: `ram:` and dirty maps may be as large as a disk."""
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
