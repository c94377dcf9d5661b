"""The process that workers and openers are forked from: it has imported all that they may need, and opened nothing.

Must not start a thread, open a device or a file, or import what a third party wrote: every worker would have it. All
that it holds for its workers are the empty namespaces of their walls.

Over the socket whose number is given the zygote says ``ready``. Then each datagram asks for processes: a letter for
each, ``w`` or ``o``, and the words of its chain, as in ``wo xor,aio``; beside it comes, for each process, one end
of a socket, its cord. The zygote sends ``pidfd`` with a pidfd of each, and ``born`` once init, or whatever adopts
orphans, is their parent; or ``failed``. It ends when the other end of its socket is closed. A new process gets the
socket that it serves over its cord, beside a datagram. If the cord is closed before, nobody waits for the process any
more, and it ends.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.opener import main as opener_main
from xenbackend.protocol import codec, datagrams, messages, opening
from xenbackend.walls.raising import Walls
from xenbackend.worker import birth
from xenbackend.worker import main as worker_main
from xenbackend.worker.preload import preload

WORKER, OPENER = "w", "o"
_MOST = 2  # processes at once
_MOST_ASKED = 4096  # bytes of a request: words of a chain


def _open(far: socket.socket, walls: Walls, _told: birth.Birth) -> int:
    """Be an opener, which has no walls."""
    walls.close()
    return opener_main.serve(far)


SERVE = {WORKER: worker_main.serve, OPENER: _open}


@dataclass(frozen=True, slots=True)
class Born:
    """A new process: its kind, the socket that it serves, and what it is told if it is a worker."""

    kind: str
    far: socket.socket
    told: birth.Birth


def wait_for_birth(channel: socket.socket, walls: Walls) -> Born | None:
    """Fork processes at each request; return what it is in each new process, and None in the zygote, at its end."""
    channel.send(b"ready")
    while True:
        datagram, fds, _ = datagrams.receive(channel, _MOST_ASKED, _MOST)
        if not fds:
            return None
        kinds, _, drivers = datagram.decode().partition(" ")
        try:
            between = os.fork()
        except OSError:
            between = -1
        if between == 0:
            number, pid, why_not_alone = _bear(channel, kinds, walls)
            channel.close()
            for other, fd in enumerate(fds):
                if other != number:
                    os.close(fd)
            told = birth.Birth(pid, birth.words(drivers), why_not_alone)
            return Born(kinds[number], _take_socket(fds[number]), told)
        for fd in fds:
            os.close(fd)
        is_born = between > 0 and os.waitpid(between, 0)[1] == 0
        channel.send(b"born" if is_born else b"failed")


def _take_socket(number: int) -> socket.socket:
    """Return the socket that comes over a new process's cord; end the process if none comes."""
    with socket.socket(fileno=number) as cord, suppress(OSError):
        _, fds, _ = datagrams.receive(cord, _MOST_ASKED, 1)
        if fds:
            return socket.socket(fileno=fds[0])
    os._exit(0)


def _bear(channel: socket.socket, kinds: str, walls: Walls) -> tuple[int, int, str]:
    """Return in children of this process, each of which leads a session, and end this process.

    So init, or whatever adopts orphans, becomes their parent. A worker comes last, as it begins a PID namespace.

    Returns: the child's place in `kinds`, its process id as the host knows it, and why it can see other processes,
    empty if it cannot.
    """
    born: dict[int, tuple[int, socket.socket]] = {}  # by place: a pidfd, and a socket that the child closes
    why_not_alone = ""
    try:
        for place in sorted(range(len(kinds)), key=lambda place: kinds[place] == WORKER):
            if kinds[place] == WORKER:
                why_not_alone = walls.new_pid_namespace()
            near, far = socket.socketpair()
            child = os.fork()
            if child == 0:
                near.close()
                for pidfd, other in born.values():
                    os.close(pidfd)
                    other.close()
                pid = int(far.recv(16))
                os.setsid()
                far.close()
                return place, pid, why_not_alone
            far.close()
            near.send(b"%d" % child)
            born[place] = os.pidfd_open(child), near
        for _, near in born.values():
            near.recv(1)  # nothing comes: it leads its session, or has ended
        datagrams.send(channel, b"pidfd", [born[place][0] for place in range(len(kinds))])
    except OSError:
        os._exit(1)
    os._exit(0)


def main(arguments: list[str]) -> int:
    """Import everything for workers on the host that `arguments` name, and serve the socket given by number."""
    given = birth.parse(arguments)
    if given is None or "host" not in given:
        print("the zygote is started by the service, with --host and --socket", file=sys.stderr)
        return 2
    walls = Walls(given.get("walls", "off"))
    preload(given["host"])
    codec.prepare(messages.FromSupervisor, messages.FromWorker)
    codec.prepare(opening.FromSupervisor, opening.FromOpener, opening.Question)
    channel = datagrams.inherited(int(given["socket"]))
    # Keep the garbage collector from all objects made so far: it would write to memory that workers share.
    gc.collect()
    gc.freeze()
    try:
        born = wait_for_birth(channel, walls)
    except (BrokenPipeError, ConnectionResetError):  # the service went away while we spoke
        return 1
    if born is None:
        return 0
    # At once: at its own end the interpreter would write to each page that it shares with the zygote, 2,200 of them, to
    # free memory that goes with the process anyhow.
    os._exit(SERVE[born.kind](born.far, walls, born.told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
