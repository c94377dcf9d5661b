"""A process of its own that opens chains and tells what was opened, connected to or started meanwhile.

Usage: watched.py SOUND [PLACE...] < CHAINS. `SOUND` is a chain for each driver, one to a line, to load what they
import; `PLACE`s are where the settings allow parents; the chains to look at are separated by NUL. Prints a line of JSON
for each: what it said, and the events. An audit hook cannot be taken back, nor be gone round by code in Python.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.helpers_block import Machine, read
from xenbackend.errors import XenbackendError
from xenbackend.worker.preload import preload

WATCHED = ("open", "socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.listdir",
           "os.scandir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "ctypes.dlopen")  # fmt: skip

# Which loop devices there are, and over what; which images other backends of Xen serve: the same for every image.
HOST = ("/sys/block", "/sys/bus/xen-backend/devices", "/run/xen", "/proc/self/mountinfo")

events: list[tuple[str, str]] = []
is_watching = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a chain may have caused. O_PATH opens nothing: no device notices, and nothing can be read."""
    if not (is_watching and event.startswith(WATCHED)) or (event == "open" and arguments[2] & os.O_PATH):
        return
    what = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else repr(arguments)
    if what.startswith("/proc/self/fd/"):  # a file that is held already is opened for real, whatever is called so now
        what = str(Path(what).readlink())
    if what.startswith(HOST):
        return
    if (event, what) not in events:
        events.append((event, what))


def look(machine: Machine, chain_text: str) -> str:
    """Open a chain, read its beginning, and return what happened."""
    try:
        chain = machine.open(chain_text, read_only=True)
    except XenbackendError as error:
        return str(error)
    status = machine.do(chain, read(0, 4096))
    chain.close()
    return f"opened: {status}"


def main(sound: str, *places: str) -> None:
    """Look at each chain under the hook."""
    global is_watching  # noqa: PLW0603 - a hook is for the whole process
    machine = Machine(places)
    for chain in sound.split("\n"):
        said = look(machine, chain)
        assert said == "opened: [0]", said
    preload("xenbackend.kernel.xen")  # what is imported when it is first used
    sys.addaudithook(hook)
    for chain in sys.stdin.read().split("\0"):
        is_watching = True
        said = look(machine, chain)
        is_watching = False
        print(json.dumps({"said": said, "events": events}), flush=True)
        events.clear()
    machine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
