"""A real Ceph in a directory, as ordinary processes of a test: a monitor and an OSD in memory, with keys (cephx).

Must not leave a process behind, nor wait for ever: each command has a time-out, because `rbd` has none that helps if
there is no monitor. The cluster believes a client alive for 6 s after its last sign of life instead of 30 s, since
`rbd` waits for that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

COMMAND_S = 30.0
START_S = 30.0
POOL = "rbd"

_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}/0
public addr = 127.0.0.1
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {directory}/keyring
run dir = {directory}/run
log file = {directory}/log/$name.log
log to stderr = false
pid file =
admin socket = {directory}/run/$name.$pid.asok
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
auth allow insecure global id reclaim = false
mon data avail warn = 1
mon data avail crit = 0
mon initial members = a
[client]
admin socket =
log file =
[mon]
paxos propose interval = 0.05
paxos min wait = 0.01
mon data = {directory}/mon
mon cluster log file = {directory}/log/cluster.log
[osd]
osd data = {directory}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
memstore page set = true
osd class load list = *
osd client watch timeout = 6
osd mon report interval = 1
osd op num shards = 2
osd op num threads per shard = 1
osd fast shutdown = false
"""


_WISHES = """\
[client]
rbd cache = true
rbd cache writethrough until flush = false
rados osd op timeout = 1
"""


class Ceph:
    """One cluster, with the pool `rbd`.

    conf    path of the ceph.conf that chains name. It asks for a cache and for operations that time out, and leads to
            the key of ``client.admin``
    """

    def __init__(self, directory: Path) -> None:
        """Start nothing yet. Skip the test if this host has no Ceph."""
        for program in ("ceph-mon", "ceph-osd", "rbd"):
            if shutil.which(program) is None:
                pytest.skip(f"there is no {program} here")
        self.directory = directory
        self.conf = directory / "ceph.conf"
        self._own_conf = directory / "own.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def chain(self, image: str, options: str = "") -> str:
        """Return the layer for `image`, named as `rbd` names it behind the pool. `options` are those of `add_user`."""
        return f"rbd:{POOL}/{image},{options or f'conf={self.conf}'}"

    def start(self) -> None:
        """Start the cluster, and return when it can be used."""
        for each in ("run", "log", "mon", "osd"):
            (self.directory / each).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fsid = str(uuid.uuid4())
        text = _CONF.format(fsid=fsid, port=port, directory=self.directory)
        self._own_conf.write_text(text)
        self.conf.write_text(text + _WISHES)
        keyring, monmap = str(self.directory / "keyring"), str(self.directory / "monmap")
        everything = [word for each in ("mon", "osd", "mgr") for word in ("--cap", each, "allow *")]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}/0]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring, "-c", str(self._own_conf))
        self._begin("ceph-mon", "-i", "a")
        self._until(lambda: bool(self._try("ceph", "--connect-timeout", "2", "mon", "stat")))
        number = str(uuid.uuid4())
        key = self._run("ceph-authtool", "--gen-print-key").strip()
        self._run(
            "ceph",
            "-c",
            str(self._own_conf),
            "osd",
            "new",
            number,
            "0",
            "-i",
            "-",
            given=json.dumps({"cephx_secret": key}),
        )
        osd_keyring = self.directory / "osd" / "keyring"
        osd_keyring.write_text(f"[osd.0]\n\tkey = {key}\n")
        self._run("ceph-osd", *self._osd(), "--mkfs", "--osd-uuid", number, "-c", str(self._own_conf))
        self._begin_osd()
        self.ceph("osd", "pool", "create", POOL, "8", "8")
        self.rbd("pool", "init", POOL)

    def ceph(self, *words: str) -> str:
        """Run a command of `ceph` as administrator, and return its output."""
        return self._run("ceph", "-c", str(self._own_conf), *words)

    def rbd(self, *words: str) -> str:
        """Run a command of `rbd` as administrator, and return its output."""
        return self._run("rbd", "-c", str(self._own_conf), *words)

    def json(self, *words: str) -> Any:
        """Run a command of `rbd`, and return its output as a value."""
        return json.loads(self.rbd(*words, "--format", "json"))

    def digest(self, image: str) -> str:
        """Return a digest of an image's content."""
        command = ["rbd", "-c", str(self._own_conf), "export", "--no-progress", f"{POOL}/{image}", "-"]
        done = subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)
        return hashlib.sha256(done.stdout).hexdigest()

    def create(self, image: str, size: str = "64M", *options: str) -> str:
        """Make an image, and return its chain."""
        self.rbd("create", "--size", size, *options, f"{POOL}/{image}")
        return self.chain(image)

    def add_user(self, name: str, mon: str = "profile rbd", osd: str = f"profile rbd pool={POOL}") -> str:
        """Make a user or change its rights, and return a chain's options for that user."""
        conf = self.directory / f"{name}.conf"
        keyring = self.directory / f"{name}.keyring"
        if conf.exists():
            self.ceph("auth", "caps", f"client.{name}", "mon", mon, "osd", osd)
        else:
            self.ceph("auth", "get-or-create", f"client.{name}", "mon", mon, "osd", osd, "-o", str(keyring))
            text = self.conf.read_text().replace(f"keyring = {self.directory}/keyring", f"keyring = {keyring}")
            conf.write_text(text)
        return f"id={name},conf={conf}"

    def remove_user(self, name: str) -> Callable[[], object]:
        """Remove a user. Return a function that makes it again, with its key and its rights."""
        kept = self.directory / f"{name}.removed"
        kept.write_text(self.ceph("auth", "export", f"client.{name}"))
        self.ceph("auth", "rm", f"client.{name}")
        return lambda: self.ceph("auth", "import", "-i", str(kept))

    def set_ticket_s(self, seconds: int) -> None:
        """Set how long a client's rights hold until the monitors are asked again; an hour is usual."""
        self.ceph("tell", "mon.a", "config", "set", "auth_service_ticket_ttl", str(seconds))

    def restart_osd(self) -> None:
        """Stop the OSD in order and start it again, so that all clients connect anew."""
        process = self._processes.pop("ceph-osd")
        process.terminate()
        process.wait(COMMAND_S)
        self._begin_osd()

    def stop_osd(self) -> None:
        """Stop the OSD by SIGSTOP."""
        self._processes["ceph-osd"].send_signal(signal.SIGSTOP)

    def continue_osd(self) -> None:
        """Continue the OSD by SIGCONT."""
        self._processes["ceph-osd"].send_signal(signal.SIGCONT)

    def be_full(self, is_full: bool) -> None:
        """Make the cluster full, or not full any more, and return when it knows."""
        ratios = {"nearfull": "0.85", "backfillfull": "0.9", "full": "0.95"}
        for name, ratio in ratios.items() if not is_full else zip(ratios, ("5e-4", "7e-4", "1e-3"), strict=True):
            self.ceph("osd", f"set-{name}-ratio", ratio)
        self._until(lambda: is_full == ("OSD_FULL" in self.ceph("health", "detail")))

    def kill(self) -> None:
        """Kill all processes."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _begin(self, program: str, *words: str) -> None:
        log = (self.directory / "log" / f"{program}.out").open("wb")
        with log:
            command = [program, *words, "-c", str(self._own_conf), "-f"]
            # Debian 13 has `osd class dir` relative to the root directory, where systemd starts it
            self._processes[program] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/"
            )

    def _begin_osd(self) -> None:
        self._begin("ceph-osd", *self._osd())
        self._until(lambda: json.loads(self.ceph("osd", "stat", "-f", "json"))["num_up_osds"] == 1)

    def _osd(self) -> tuple[str, ...]:
        return ("-i", "0", "--keyring", str(self.directory / "osd" / "keyring"))

    def _until(self, condition: Any) -> None:
        give_up = time.monotonic() + START_S
        while not condition():
            for program, process in self._processes.items():
                assert process.poll() is None, f"{program} has ended; {self.directory}/log says why"
            assert time.monotonic() < give_up, "the cluster does not come up"

    def _try(self, *words: str) -> str:
        command = [words[0], "-c", str(self._own_conf), *words[1:]]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S
        )
        return done.stdout + done.stderr if done.returncode == 0 else ""

    def _run(self, *command: str, given: str = "") -> str:
        done = subprocess.run(command, check=False, input=given, capture_output=True, text=True, timeout=COMMAND_S)
        assert 0 == done.returncode, f"{' '.join(command)}: {done.stderr}"
        return done.stdout
