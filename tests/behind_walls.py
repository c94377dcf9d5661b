"""Runs a canary behind all walls, or all but some, and reports what it got: a program, as that has a single thread.

Must not run a canary outside of a mount namespace of its own.

    python -m tests.behind_walls DIRECTORY    prints JSON: what was got, by the walls that were left out
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tests import canary
from xenbackend.walls.raising import FIRST_USER, Raised, Wall, Walls

_ALL = "all"
_NULL = os.makedev(1, 3)  # /dev/null


class Partial(Walls):
    """All walls but those in `out`."""

    def __init__(self, out: Iterable[Wall]) -> None:
        super().__init__("on")
        self._out = set(out)

    def new_pid_namespace(self) -> str:
        return super().new_pid_namespace() if Wall.PROCESSES not in self._out else "left out"

    def raise_one(self, wall: Wall, raised: Raised, step: Callable[[], None]) -> None:
        if wall not in self._out:
            super().raise_one(wall, raised, step)


def find(place: Path, out: Iterable[Wall]) -> dict[str, list[str] | dict[str, str]]:
    """Return what a canary got behind all walls but some, what can be seen of it from outside, and which are down."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with canary.surroundings(place) as at:
        between = os.fork()
        if between == 0:
            near.close()
            _run_canary(at, far, Partial(out))
        far.close()
        pid = int(near.recv(64))
        seen = inspect(pid)
        near.send(b"go")
        told = json.loads(near.recv(1 << 16))
        os.waitpid(between, 0)
        near.close()
    return {"got": told["got"], "seen": seen, "down": told["down"]}


def _run_canary(at: canary.Surroundings, far: socket.socket, walls: Walls) -> None:
    try:
        canary.confine_yourself()
        os.environ["XENBACKEND_CANARY"] = "1"
        why_not_alone = walls.new_pid_namespace()
        here, there = socket.socketpair()
        child = os.fork()
        if child:
            here.send(b"%d" % child)
            os.waitpid(child, 0)
            os._exit(0)
        here.close()
        pid = int(there.recv(16))
        _have_something_to_leave()
        raised = walls.begin([far.fileno()])
        walls.raise_all(pid, raised, why_not_alone=why_not_alone)
        far.send(b"%d" % pid)
        far.recv(2)
        far.send(json.dumps({"got": canary.try_all(at), "down": raised.down}).encode())
    except BaseException as problem:
        far.send(repr(problem).encode())
    finally:
        os._exit(0)


def _have_something_to_leave() -> None:
    """Take a capability that programs would inherit: CAP_KILL."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = struct.pack("=Ii", 0x20080522, 0), bytearray(24)
    libc.capget(header, (ctypes.c_char * 24).from_buffer(sets))
    sets[8:12] = (1 << 5).to_bytes(4, "little")
    if libc.capset(header, bytes(sets)):
        raise OSError(ctypes.get_errno(), "capset")


def inspect(pid: int) -> list[str]:
    """Return what is wrong with a process behind walls, as root sees it in /proc."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    amiss = []
    if {*status["Uid"].split(), *status["Gid"].split()} != {str(FIRST_USER + pid)}:
        amiss.append("another user")
    if status["Groups"].strip():
        amiss.append("groups")
    amiss += [key for key in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status[key], 16)]
    amiss += [key for key, wanted in (("NoNewPrivs", "1"), ("Seccomp", "2")) if status[key].strip() != wanted]
    if len(status["NSpid"].split()) < 2:
        amiss.append("the host's processes")
    for name in ("mnt", "net", "ipc", "uts"):
        if (process / "ns" / name).readlink() == Path(f"/proc/self/ns/{name}").readlink():
            amiss.append(f"namespace {name}")
    if os.listdir(process / "root/"):
        amiss.append("files in its root")
    if (process / "stat").stat().st_uid:
        amiss.append("can be dumped")
    limits = (process / "limits").read_text()
    if not re.search(r"core file size +0 +0 ", limits) or not re.search(r"processes +512 +512 ", limits):
        amiss.append("limits")
    nowhere = [fd for fd in (0, 1, 2) if (process / f"fd/{fd}").stat().st_rdev == _NULL]
    if nowhere != [0, 1, 2]:
        amiss.append("standard descriptors")
    return amiss


def main(place: Path) -> None:
    """Leave out each wall in turn, together with the filter of system calls, which alone would hide most of them."""
    canary.confine_yourself()
    found = {}
    combinations: list[tuple[Wall, ...]] = [(), (Wall.CALLS,), tuple(Wall)]
    combinations += [(wall, Wall.CALLS) for wall in Wall if wall is not Wall.CALLS]
    combinations += [(Wall.USER, Wall.DUMPS, Wall.CALLS)]
    for number, out in enumerate(combinations):
        (place / str(number)).mkdir()
        found[",".join(out) if len(out) < len(Wall) else _ALL] = find(place / str(number), out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
