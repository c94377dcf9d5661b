"""Workers that were taken over, against their own service; `tests.supervisor.wild_worker` has what they do."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from operator import and_
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.supervisor.helpers import offer_ring
from tests.supervisor.wild_worker import DISKS, ENVIRONMENT, HEARD, IS_CALM, Words
from tests.workload import Load, make_model, read_all
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.protocol.client import ServiceError
from xenbackend.rig.frontend import Wishes
from xenbackend.supervisor.vbd.vbd_log import PER_HOUR
from xenbackend.supervisor.xenstore.store import Store

SECTORS = 2048
NEIGHBOUR = DISKS + 1  # domain of a guest with a real worker
PATIENCE_S = 20.0
MAX_ANSWER_S = 5.0  # for `ping` and `status`, whatever workers do
MAX_GROWTH = 64 << 10  # KiB of the service
_LOOKS = 5


class Bed:
    """A service with a neighbour and wild disks."""

    def __init__(self, machine: Machine, words: Words, image: Path, seed: int) -> None:
        self.machine = machine
        self.words = words.words
        self.random = Random(seed)
        self.longest_s = 0.0
        self.disks: list[str] = []  # the wild ones' backend directories
        self.service = int(self.ask({"verb": "ping"})["pid"])
        assert machine.service is not None
        self.processes = (self.service, machine.service.pid)  # and the keeper of its descriptors
        self.guest = machine.create_guest(NEIGHBOUR)
        self.frontend = self.guest.connect(machine.attach(NEIGHBOUR, "xvda", f"log:|aio:{image}"), Wishes())
        self.model = make_model(seed, SECTORS)
        self.load = Load(self.frontend, self.model)

    def attach(self, domid: int) -> None:
        """Give a guest a wild disk, and let it connect."""
        store = Store(self.machine.xenstored.add_domain_socket(domid))
        self.machine.store.write(f"/local/domain/{domid}/name", f"wild-{domid}")
        path = self.machine.attach(domid, "xvda", "null:1G")
        self.disks.append(path.backend)
        offer_ring(store, path)
        self.until(lambda: self.machine.store.read(f"{path.backend}/state") == "4")
        store.write(f"{path.frontend}/state", "4")
        store.close()

    def ask(self, request: dict[str, Any]) -> Any:
        """Ask the service, which must answer soon."""
        begin = time.monotonic()
        answer = self.machine.ask(request)["data"]
        self.longest_s = max(self.longest_s, time.monotonic() - begin)
        return answer

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition while the neighbour's guest works."""
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, "it never happened"
            self.load.run(64)

    def are_served(self) -> bool:
        """Return whether all disks are served; resume those that wait for an administrator."""
        phases = {each["vbd"]: each["phase"] for each in self.ask({"verb": "status"})}
        assert DISKS + 1 == len(phases)
        for vbd, phase in phases.items():
            if phase in ("none", "resting"):
                with suppress(ServiceError):
                    self.ask({"verb": "resume", "vbd": vbd, "wait": 0})
        return {"serving"} == {*phases.values()}

    def mislead(self) -> list[str]:
        """Return where wild disks say that they serve a device model, although none was told to."""
        said = [self.machine.store.read_optional(f"{each}/physical-device-path") for each in self.disks]
        return [each for each in said if each is not None]

    def has_openers(self) -> bool:
        """Return whether each wild worker's opener has begun; none of them is let go."""
        children = Path(f"/proc/{self.service}/task/{self.service}/children").read_text().split()
        return 2 * DISKS + 2 == len(children)  # and the zygote, and the neighbour's worker

    def descriptors(self) -> list[Counter[str]]:
        """Return what descriptors the service and its keeper have, without those of clients that were just answered."""
        looks = [self._descriptors() for _ in range(_LOOKS)]
        return [reduce(and_, each) for each in zip(*looks, strict=True)]

    def _descriptors(self) -> list[Counter[str]]:
        self.load.run(64)
        return [Counter(_kinds(pid)) for pid in self.processes]

    def memory(self) -> int:
        """Return the KiB of memory that the service uses."""
        status = Path(f"/proc/{self.service}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


def _kinds(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            yield str(link.readlink()).partition(":[")[0]


def _order(machine: Machine, random: Random, is_over: threading.Event) -> None:
    """Give orders for wild disks all the time, as an administrator."""
    requests: list[dict[str, Any]] = [
        {"verb": "pause"}, {"verb": "resume"}, {"verb": "policy", "policy": "read=report"}, {"verb": "upgrade"},
        {"verb": "command", "layer": "0", "command": "get"}, {"verb": "set", "chain": "null:1G"},
        {"verb": "set", "chain": "null:7G"}, {"verb": "resize"}, {"verb": "set", "chain": "null:1G", "dry_run": True},
    ]  # fmt: skip
    while not is_over.wait(0.02):
        with suppress(XenbackendError):
            machine.ask({**random.choice(requests), "vbd": f"{random.randint(1, DISKS)}/xvda", "wait": 0.02})


@pytest.mark.slow
def test_any_bytes_of_a_worker_harm_nobody_else(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a worker sends or leaves, it is killed, logged once and replaced if it breaks the protocol.

    Meanwhile the service answers and a neighbour reads what it wrote; at the end nothing is left over. `--requests`
    sets the length: half as many messages as it says.
    """
    count, seed = request.config.getoption("--requests") // 2, request.config.getoption("--seed")
    image, log = tmp_path / "disk.img", tmp_path / "log"
    image.write_bytes(bytes(SECTORS * 512))
    words = Words.make(tmp_path / "words", seed)
    words.words[IS_CALM] = 1
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "words"))
    is_over = threading.Event()
    with Machine(log=log, program="tests.supervisor.wild_service") as machine:
        bed = Bed(machine, words, image, seed)
        for domid in range(1, DISKS + 1):
            bed.attach(domid)
        bed.until(bed.are_served)
        bed.until(bed.has_openers)
        calm, memory, began = bed.descriptors(), bed.memory(), time.monotonic()
        words.words[IS_CALM] = 0
        for domid in range(1, DISKS + 1):
            with suppress(ServiceError):
                machine.ask({"verb": "upgrade", "vbd": f"{domid}/xvda", "wait": 0})
        administrator = threading.Thread(target=_order, args=(machine, Random(seed), is_over))
        administrator.start()
        try:
            give_up = began + PATIENCE_S
            while words.words[HEARD] < count or (not all(words.deeds().values()) and time.monotonic() < give_up):
                bed.load.run(64)
                bed.ask({"verb": "ping"})
                bed.are_served()
                assert [] == bed.mislead()
                is_over.wait(0.02)  # let other threads run
        finally:
            is_over.set()
            administrator.join()
            words.words[IS_CALM] = 1
        passed_s = time.monotonic() - began
        bed.until(bed.are_served)
        bed.until(lambda: all(not each["under_way"] for each in bed.ask({"verb": "status"})))
        bed.until(lambda: calm == bed.descriptors())
        known = bed.ask({"verb": "ping"})
        assert bed.service == known["pid"]
        growth = bed.memory() - memory
        bed.load.finish()
        read_all(bed.frontend, bed.model)
        bed.guest.close()
    _look(log, known, words, passed_s, bed)
    assert growth < MAX_GROWTH


def _look(log: Path, known: dict[str, Any], words: Words, passed_s: float, bed: Bed) -> None:
    """Compare what the service has logged with what was done."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    broken = [line["worker"] for line in lines if line["event"].startswith("a worker broke the protocol")]
    said = Counter[str]()  # bytes, by disk; those about none are the service's own lines
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            said[json.loads(line).get("vbd", "")] += len(line) + 1
    deeds = words.deeds()
    print(
        f"{words.words[HEARD]} messages of {words.lives()} workers in {passed_s:.0f} s, {len(broken)} breaches, {deeds}"
    )

    assert 0 == known["bugs"], [line for line in lines if "bug" in line["event"]][:3]
    assert [] == [line for line in lines if "a bug" in line["event"]]
    assert len(broken) == len(set(broken))
    assert DISKS <= len(broken) <= known["breaches"]  # the log has as many as each disk's budget allows
    assert 0 == bed.model.failures
    assert bed.longest_s < MAX_ANSWER_S
    assert 0 == words.openers()
    assert max(said.values()) <= PER_HOUR
    assert [] == [name for name, number in deeds.items() if not number]
