"""How a worker begins: it gets what it cannot get behind walls, and then raises them, before it hears a message.

Must not know what walls are made of (`walls.raising`), nor open or import anything once they are up.

    have imported   all that we import late, all of our drivers, and those of third parties that the chain names
    close           every descriptor but the supervisor's socket
    open            what we use by descriptors only: the loop, the host's load, a restricted io_uring
    raise           the other walls
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

from xenbackend.block.drivers import load_ahead
from xenbackend.errors import KernelError
from xenbackend.walls.raising import Raised, Walls
from xenbackend.worker import io_queue
from xenbackend.worker.preload import preload


@dataclass(frozen=True, slots=True)
class Birth:
    """What one worker is told of itself.

    pid             its number, as the host knows it
    drivers         words of its chain that are third parties'
    why_not_alone   why it sees other processes: empty where it does not, None where nobody tried
    """

    pid: int
    drivers: tuple[str, ...] = ()
    why_not_alone: str | None = None


def parse(arguments: list[str]) -> dict[str, str] | None:
    """Return a command line of pairs by name, without the dashes; None where it is none of ours."""
    names, values = arguments[::2], arguments[1::2]
    found = {name.removeprefix("--"): value for name, value in zip(names, values, strict=False)}
    is_ours = len(names) == len(values) == len(found) and all(name.startswith("--") for name in names)
    is_known = found.keys() <= {"host", "walls", "drivers", "socket"}
    return found if is_ours and is_known and found.get("socket", "").isdecimal() else None


def close_everything_but(near: socket.socket, walls: Walls, birth: Birth) -> Raised:
    """Import the drivers of third parties, and then have nothing open but the supervisor's socket."""
    needs: set[str] = set()
    if walls.mode != "off":
        needs.update(*(driver.needs for driver in load_ahead(birth.drivers)))
    return walls.begin([near.fileno()], needs)


def raise_walls(walls: Walls, birth: Birth, raised: Raised) -> None:
    """Open what is used by its descriptor only, then raise all walls."""
    if walls.mode != "off":
        with suppress(KernelError):  # the host has none for us, and threads take its place
            io_queue.set_aside()
    walls.raise_all(birth.pid, raised, why_not_alone=birth.why_not_alone)


def words(text: str) -> tuple[str, ...]:
    """Return the names in a text such as ``xor,canary``."""
    return tuple(each for each in text.split(",") if each)


def by_exec(arguments: dict[str, str]) -> tuple[Walls, Birth]:
    """Return what a worker is told that was started by its command line. Imports everything, where there are walls."""
    walls = Walls(arguments.get("walls", "off"))
    if walls.mode != "off":
        preload(arguments["host"])
    return walls, Birth(os.getpid(), words(arguments.get("drivers", "")))
