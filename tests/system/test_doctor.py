"""`xenbackend doctor` on a simulated host in which one thing after another is broken: each is one finding."""

from __future__ import annotations

import grp
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_json import documented, keys
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
DISK = "5/xvda"
LIMIT_S = 45.0  # for a whole examination on a loaded host; each look has seconds
Found = dict[str, Any]
AS_NOBODY = """
import difflib, encodings.ascii, os, shutil, sys, tomllib  # while Python can be read
from xenbackend.cli import doctor, doctor_text, output, top, top_rows, top_screen
from xenbackend.doctor import examine
from xenbackend.cli.main import main
os.setgroups([])
os.setgid({group})
os.setuid(65534)
sys.exit(main({words}))
"""


class Host:
    """A host with a guest that uses its disk."""

    def __init__(self, machine: Machine, image: Path) -> None:
        self.machine, self.image = machine, image

    def doctor(self, *words: str) -> tuple[int, list[Found]]:
        """Return the exit status and the findings that are not well."""
        begun = time.monotonic()
        command = [sys.executable, "-m", "xenbackend", "doctor", "--json", "--socket", self.machine.control, *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert time.monotonic() - begun < LIMIT_S
        return result.returncode, not_well(result.stdout)

    def known(self) -> Found:
        """Return what the service says of the disk."""
        [known] = self.machine.ask({"verb": "status", "vbd": DISK})["data"]
        return known


def not_well(text: str) -> list[Found]:
    """Return the findings that are not well, of JSON that has the keys of docs/json.md."""
    values = json.loads(text)
    assert documented("doctor")[0] == keys(values, set())
    return [each for each in values["findings"] if each["verdict"] != "ok"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host that the tests share: each repairs what it breaks."""
    image = tmp_path_factory.mktemp("host") / "img"
    image.write_bytes(bytes(1 << 20))
    config = image.with_name("x.toml")
    config.write_text(f'group = "{grp.getgrgid(65534).gr_name}"\n')
    with Machine(config=config) as machine:
        guest = machine.create_guest(5)
        path = machine.attach(5, "xvda", f"log:|aio:{image}")
        frontend = guest.connect(path, Wishes())
        yield Host(machine, image)
        frontend.close()
        machine.detach(path)
        guest.close()


def test_a_host_that_is_well(host: Host) -> None:
    """On a sound host nothing is found, of the host or of a disk, and the exit status is 0."""
    assert (0, []) == host.doctor()
    assert (0, []) == host.doctor(DISK)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process stopped by SIGSTOP."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def silent_store(machine: Machine) -> Iterator[None]:
    """Keep xenstored stopped, so that it does not answer."""
    goes_on = threading.Event()
    thread = threading.Thread(target=lambda: machine.xenstored._on_thread(goes_on.wait))
    thread.start()
    try:
        yield
    finally:
        goes_on.set()
        thread.join()


@contextmanager
def paused(host: Host) -> Iterator[None]:
    """Keep the disk paused."""
    host.machine.ask({"verb": "pause", "vbd": DISK})
    try:
        yield
    finally:
        host.machine.ask({"verb": "resume", "vbd": DISK})


@pytest.mark.parametrize(
    ("breaks", "check", "words"),
    [
        (paused, "paused", "the disk is paused by uid"),
        (lambda host: stopped(host.known()["worker"]), "worker", "has been stopped by a signal or a debugger"),
        (lambda host: silent_store(host.machine), "xenstored", "did not answer in time"),
        (lambda host: stopped(host.machine.service_pid), "service", "has been stopped by a signal or a debugger"),
    ],
)
def test_each_thing_that_is_broken_is_one_finding(
    host: Host, breaks: Callable[[Host], Any], check: str, words: str
) -> None:
    """A fault is one finding, with a command and exit status 1; its consequences are no findings of their own."""
    with breaks(host):
        status, found = host.doctor(DISK)
    assert 1 == sum(each["verdict"] == "wrong" for each in found), found
    [wrong] = [each for each in found if each["verdict"] == "wrong"]

    assert (1, check) == (status, wrong["check"])
    assert words in wrong["sentence"]
    assert wrong["command"]


def test_a_member_of_the_group_learns_what_the_service_knows(host: Host) -> None:
    """A member of the group sees what the service tells; what only root may read is unknown. `top` shows everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root to be somebody else")
    machine = host.machine
    for each in (machine.directory, *machine.directory.parents):
        if not each.stat().st_mode & 0o001:  # the directory of this test or of the whole run
            each.chmod(0o711)
    words = {"doctor": ["--json"], "top": ["--json", "--once", "--interval", "1"]}
    texts = {}
    for command, options in words.items():
        arguments = [command, *options, "--socket", machine.control]
        program = AS_NOBODY.format(group=65534, words=arguments)
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        texts[command] = result.stdout
        assert (3 if command == "doctor" else 0) == result.returncode, result.stderr
    found = not_well(texts["doctor"])

    assert [("unknown", "descriptors")] == [(each["verdict"], each["check"]) for each in found]
    assert [DISK] == [each["vbd"] for each in json.loads(texts["top"])["vbds"]]


def test_who_has_to_move(host: Host) -> None:
    """A disk that the guest has not connected yet is waited for; an unknown disk is reported with the known ones."""
    path = host.machine.attach(5, "xvdb", "ram:1M")
    try:
        assert (0, []) == host.doctor("5/xvdb")  # a guest has half a minute to connect
    finally:
        host.machine.detach(path)
    status, [wrong] = host.doctor("5/xvdz")

    assert (1, "disk") == (status, wrong["check"])
    assert f"(there are {DISK})" in wrong["sentence"]


def test_without_a_service_xenstore_tells(tmp_path: Path) -> None:
    """Without a service, a disk waiting in xenstore is reported with that cause and with who has its image; the
    service's own state is unknown.
    """
    image = tmp_path / "img"
    image.write_bytes(bytes(1 << 20))
    with Machine() as machine:
        host = Host(machine, image)
        guest = machine.create_guest(5)
        machine.attach(5, "xvda", f"aio:{image}")
        machine.stop_service()
        words = ("--store", f"{machine.directory}/xenstore.sock", DISK)
        status, found = host.doctor(*words)
        wrong = {each["check"] for each in found if each["verdict"] == "wrong"}
        image.unlink()
        _, later = host.doctor(*words)
        guest.close()

    assert (1, True) == (status, "service" in wrong)
    assert "file" not in wrong
    [missing] = [each for each in later if each["check"] == "file"]
    assert (DISK, f"there is no file or device {image}") == (missing["disk"], missing["sentence"])
