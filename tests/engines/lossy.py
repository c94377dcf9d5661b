"""A link between this host and a network namespace of its own that loses packets, as this kernel may have no netem.

Must not leave anything behind: both ends are TUN devices, which go with the processes that have them open.

`python -m tests.engines.lossy FD COMMAND` is the far end, behind `unshare -n`; COMMAND runs there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from random import Random
from struct import pack
from typing import Self

import pytest

NEAR, FAR = "198.51.100.1", "198.51.100.2"  # RFC 5737: nobody has them
_TUNSETIFF, _TUN_NO_PI = 0x400454CA, 0x1001  # linux/if_tun.h
_MTU = 1500


class LossyLink:
    """The link, with a command at its far end; `lost` packets of `carried` until now. `loss` may be changed."""

    def __init__(self, command: Sequence[str], loss: float, seed: int) -> None:
        """Skip the test where this host lets nobody make one."""
        if os.geteuid() or not os.access("/dev/net/tun", os.W_OK):
            pytest.skip("this host lets us make no TUN device")
        for program in ("ip", "unshare"):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program} here")
        self.carried = self.lost = 0
        self.loss, self._random, self._lock = loss, Random(seed), threading.Lock()
        self._command = list(command)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._near, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._tun = open_tun("lossy0", NEAR)
        with theirs:
            words = ["unshare", "-n", sys.executable, "-m", "tests.engines.lossy", str(theirs.fileno()), *self._command]
            self._far = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        assert b"up" == self._near.recv(_MTU)
        for carry in (self._out, self._in):
            thread = threading.Thread(target=carry, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._far.send_signal(signal.SIGTERM)
        self._far.wait()
        self._near.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waking:  # a packet for who reads the device
            waking.sendto(b"", (FAR, 9))
        for thread in self._threads:
            thread.join(10)
        self._near.close()
        os.close(self._tun)

    def _passes(self) -> bool:
        with self._lock:
            self.carried += 1
            is_lost = self._random.random() < self.loss
            self.lost += is_lost
            return not is_lost

    def _out(self) -> None:
        try:
            while True:
                packet = os.read(self._tun, _MTU)
                if self._passes():
                    self._near.send(packet)
        except OSError:
            pass  # it is over

    def _in(self) -> None:
        while packet := self._near.recv(_MTU):
            if packet != b"up" and self._passes():
                os.write(self._tun, packet)


def open_tun(name: str, address: str) -> int:
    """Make a TUN device with an address, and return it."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, pack("16sH22x", name.encode(), _TUN_NO_PI))
    for words in (["addr", "add", f"{address}/30", "dev", name], ["link", "set", name, "up", "mtu", str(_MTU)]):
        subprocess.run(["ip", *words], check=True)
    return fd


def main(number: str, *command: str) -> None:
    """Be the far end until SIGTERM."""
    tun = open_tun("lossy0", FAR)
    with socket.socket(fileno=int(number)) as near:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

        def end(*_: object) -> None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        near.send(b"up")

        def receive() -> None:
            while packet := near.recv(_MTU):
                os.write(tun, packet)

        threading.Thread(target=receive, daemon=True).start()
        while True:
            near.send(os.read(tun, _MTU))


if __name__ == "__main__":
    main(*sys.argv[1:])
