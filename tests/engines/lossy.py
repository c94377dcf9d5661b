"""A link that loses packets, between this host and a network namespace, for hosts whose kernel has no netem.

Must not leave anything behind: both ends are TUN devices, which vanish with the processes that have them open.

`python -m tests.engines.lossy FD ADDRESS COMMAND`, run by `unshare -n`, is the far end, and runs COMMAND there. It ends
when the process that made the link does.
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
from contextlib import ExitStack, suppress
from random import Random
from struct import pack
from typing import Self

import pytest

_ADDRESSES = "198.51.100"  # RFC 5737: for documentation only. Each link has four, chosen by the number of its device
_MOST_LINKS = 64  # at once
_TUNSETIFF, _TUN_NO_PI = 0x400454CA, 0x1001  # linux/if_tun.h
_MTU = 1500


class LossyLink:
    """The link, with a command at its far end. So far, `lost` of `carried` packets were lost. `loss` can be changed.

    far   the address of its far end; it replaces ADDRESS in the command
    """

    def __init__(self, command: Sequence[str], loss: float, seed: int) -> None:
        """Skip the test if this host does not allow making a link."""
        if not os.access("/dev/net/tun", os.W_OK):
            pytest.skip("this host lets us make no TUN device")
        for program in ("ip", "unshare"):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program} here")
        if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
            pytest.skip("this host lets us make no network namespace")
        self.carried = self.lost = 0
        self.far = ""
        self.loss, self._random, self._lock = loss, Random(seed), threading.Lock()
        self._command = list(command)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._near, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(self._near)
            name, self._tun = open_tun("lossy%d")
            stack.callback(os.close, self._tun)
            number = int(name.removeprefix("lossy"))
            if number >= _MOST_LINKS:
                pytest.skip(f"there are {_MOST_LINKS} links already")
            self.far = f"{_ADDRESSES}.{4 * number + 2}"
            set_up(name, f"{_ADDRESSES}.{4 * number + 1}")
            with theirs:
                words = ["unshare", "-n", sys.executable, "-m", "tests.engines.lossy", str(theirs.fileno()), self.far]
                words += [word.replace("ADDRESS", self.far) for word in self._command]
                self._far = subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            stack.callback(self._end_far)
            assert b"up" == self._near.recv(_MTU)
            for carry in (self._out, self._in):
                thread = threading.Thread(target=carry, daemon=True)
                thread.start()
                self._threads.append(thread)
            stack.callback(self._end_threads)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _end_far(self) -> None:
        self._far.send_signal(signal.SIGTERM)
        self._far.wait()

    def _end_threads(self) -> None:
        self.loss = 0.0  # so that the packet below is not lost
        self._near.shutdown(socket.SHUT_RDWR)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as waking:  # wakes the reader of the device
            waking.sendto(b"", (self.far, 9))
        for thread in self._threads:
            thread.join()

    def _passes(self) -> bool:
        with self._lock:
            self.carried += 1
            is_lost = self._random.random() < self.loss
            self.lost += is_lost
            return not is_lost

    def _out(self) -> None:
        with suppress(OSError):  # the link has been closed
            while True:
                packet = os.read(self._tun, _MTU)
                if self._passes():
                    self._near.send(packet)

    def _in(self) -> None:
        with suppress(OSError):
            while packet := self._near.recv(_MTU):
                if self._passes():
                    os.write(self._tun, packet)


def open_tun(name: str) -> tuple[str, int]:
    """Make a TUN device, and return its name, with a number for %d, and its descriptor.

    Skip the test if this host does not allow that.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        made = fcntl.ioctl(fd, _TUNSETIFF, pack("16sH22x", name.encode(), _TUN_NO_PI))
    except PermissionError:
        os.close(fd)
        pytest.skip("this host lets us make no TUN device")
    return made[:16].rstrip(b"\0").decode(), fd


def set_up(name: str, address: str) -> None:
    """Give a device its address, and set it up."""
    for words in (["addr", "add", f"{address}/30", "dev", name], ["link", "set", name, "up", "mtu", str(_MTU)]):
        subprocess.run(["ip", *words], check=True)


def main(number: str, address: str, *command: str) -> None:
    """Be the far end until SIGTERM, or until the near end is closed."""
    name, tun = open_tun("lossy0")
    set_up(name, address)

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        with socket.socket(fileno=int(number)) as near:
            near.send(b"up")

            def receive() -> None:
                with suppress(OSError):
                    while packet := near.recv(_MTU):
                        os.write(tun, packet)
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=receive, daemon=True).start()
            while True:
                near.send(os.read(tun, _MTU))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
