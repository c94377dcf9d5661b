"""How a worker starts: it acquires what it cannot get behind walls, then raises them, before it reads a message.

Must not know how walls work (`walls.raising` does), nor open or import anything once they are up.

    import          what is imported late elsewhere, all built-in drivers, the third-party drivers that the chain names
    close           every descriptor but the supervisor's socket
    open            what it can make no more later: the loop, files that tell CPU times, its asynchronous I/O
    raise           the remaining walls
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from xenbackend.block.drivers import load_ahead, may_open_images
from xenbackend.walls.raising import Raised, Walls
from xenbackend.worker import io_queue
from xenbackend.worker.preload import preload


@dataclass(frozen=True, slots=True)
class Birth:
    """What a new worker is told about itself.

    pid             its process id, as the host knows it
    drivers         words of its chain, which name drivers; empty if they are not known
    why_not_alone   why it can see other processes: empty if it cannot, None if nobody tried to prevent it
    """

    pid: int
    drivers: tuple[str, ...] = ()
    why_not_alone: str | None = None


def parse(arguments: list[str]) -> dict[str, str] | None:
    """Return the values of a command line such as ``--socket 3``, by name without dashes; None if it is not valid."""
    names, values = arguments[::2], arguments[1::2]
    found = {name.removeprefix("--"): value for name, value in zip(names, values, strict=False)}
    is_ours = len(names) == len(values) == len(found) and all(name.startswith("--") for name in names)
    is_known = found.keys() <= {"host", "walls", "drivers", "socket"}
    return found if is_ours and is_known and found.get("socket", "").isdecimal() else None


def close_everything_but(near: socket.socket, walls: Walls, birth: Birth) -> Raised:
    """Import the third-party drivers, then close all descriptors but the supervisor's socket."""
    needs: set[str] = set()
    if walls.mode != "off":
        needs.update(*(driver.needs for driver in load_ahead(birth.drivers)))
    return walls.begin([near.fileno()], needs)


def raise_walls(walls: Walls, birth: Birth, raised: Raised) -> None:
    """Open what can be opened no more later, then raise all walls."""
    if walls.mode != "off":
        io_queue.set_aside(direct=may_open_images(birth.drivers))
    walls.raise_all(birth.pid, raised, why_not_alone=birth.why_not_alone)


def words(text: str) -> tuple[str, ...]:
    """Split a text such as ``xor,canary`` into names."""
    return tuple(each for each in text.split(",") if each)


def by_exec(arguments: dict[str, str]) -> tuple[Walls, Birth]:
    """Return walls and `Birth` of a worker that was started by exec; import everything if there are walls."""
    walls = Walls(arguments.get("walls", "off"))
    if walls.mode != "off":
        preload(arguments["host"])
    return walls, Birth(os.getpid(), words(arguments.get("drivers", "")))
