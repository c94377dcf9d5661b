"""A worker that a guest has taken over: a layer ``evil`` whose verb runs any program in the worker's process.

Must not be imported by a worker: the layer is a third party's driver, which `offer` writes.
"""

from __future__ import annotations

from pathlib import Path

_DRIVER = '''
"""evil: a layer that was taken over."""
import json, os, re, socket, struct, threading
from xenbackend import journal
from xenbackend.block.driver import Filter, Geometry
from xenbackend.note import MAGIC
from xenbackend.protocol.messages import VERSION

class Evil(Filter):
    name = "evil"
    def open(self, env):
        env.memory("record", 8192)  # what a successor asks for again
        globals()["record"] = f"{env._layer}:record"
        return super().open(env)
    def control(self, verb, arguments):
        globals()["program"] = arguments[0]
        exec(arguments[0], globals())
        return b"done"

def channel():
    """Return the worker's end of the socket to its supervisor."""
    for name in os.listdir("/proc/self/fd"):
        try:
            end = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if (end.family, end.type & 0xF) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            return end
        end.close()

def send(datagram, *fds):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    channel().sendmsg([datagram], rights)

def say(kind, *fds, **values):
    send(json.dumps({"version": VERSION, "kind": kind, **values}).encode(), *fds)

STANDING = {
    "number": 0, "stage": "serving", "chain": "evil:|ram:1M", "read_only": False, "shareable": False, "layers": [],
    "failure": "", "errno": 0, "export": "", "halted": "", "flush_failed": "", "trouble": "", "is_paused": False,
}

def stand(**values):
    """Say where we stand, as an answer to the last order, and something else with it."""
    import gc
    gc.unfreeze()
    from xenbackend.worker.main import Worker
    [worker] = [each for each in gc.get_objects() if isinstance(each, Worker)]
    say("Standing", **{**STANDING, "number": worker._number, **values})

def poke(offset, data):
    """Write into the journal."""
    for line in open("/proc/self/maps"):
        if "memfd:xenbackend-journal" in line:
            first = int(line.partition("-")[0], 16) - int(line.split()[2], 16)
            memory = os.open("/proc/self/mem", os.O_RDWR)
            assert len(data) == os.pwrite(memory, data, first + offset)
            return
    raise LookupError("no journal")

def words(*numbers):
    return struct.pack(f"{len(numbers)}Q", *numbers)

def agree(text):
    """Write what the worker has agreed on with its frontend."""
    poke(2 * 4096, words(len(text)) + text)
    poke(4096, words(MAGIC, journal.VERSION, 1))

def cut(name, size):
    """Make every memory of that name shorter that this process can lay its hands on; return how often it was let."""
    count = 0
    for each in [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")] + [
        f"/proc/self/map_files/{each}" for each in os.listdir("/proc/self/map_files")
    ]:
        try:
            if re.fullmatch(f"/memfd:{name} .*", os.readlink(each)):
                fd = os.open(each, os.O_RDWR)
                os.ftruncate(fd, size)
                count += 1
        except OSError:
            pass
    return count
'''


def offer(directory: Path) -> None:
    """Write the driver into a directory of Python's search path, as an installed package has it."""
    (directory / "taken_over_driver.py").write_text(_DRIVER)
    about = directory / "taken_over-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: taken-over\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[xenbackend.drivers]\nevil = taken_over_driver:Evil\n")
