"""Several administrators give orders at once, and orders take long: each is told what really happens."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.cli.main import main
from xenbackend.client import Client, UnderWay
from xenbackend.embedded.machine import Machine
from xenbackend.errors import XenbackendError
from xenbackend.protocol import client
from xenbackend.protocol.codes import Code
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.supervisor.xenstore.paths import VbdPath

pytestmark = pytest.mark.slow
SIZE = 1 << 20


class Site:
    """A machine with a guest that uses the image `one`."""

    def __init__(self, machine: Machine, directory: Path, path: VbdPath, frontend: Frontend) -> None:
        self.machine = machine
        self.directory = directory
        self.path = path
        self.frontend = frontend

    def status(self) -> dict[str, Any]:
        """Return what the service says of the disk."""
        [found] = self.machine.ask({"verb": "status", "vbd": "5/xvda"})["data"]
        return found

    def is_served(self) -> bool:
        """Return whether a service answers, and serves the disk."""
        with suppress(XenbackendError):
            return self.status()["phase"] == "serving"
        return False

    def under_way(self) -> list[str]:
        """Return the verbs of orders that have no answer yet."""
        return [each["verb"] for each in self.status()["under_way"]]

    def run(self, *words: str) -> tuple[int, str, str]:
        """Run a command; return its exit status and what it printed."""
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            status = main([*words, "--socket", self.machine.control])
        return status, out.getvalue(), errors.getvalue()

    def look_again(self) -> None:
        """Have the service read the disk's directory again, and wait until it has."""
        self.machine.store.write(f"{self.path.backend}/poke", "1")
        for _ in range(3):
            self.machine.ask({"verb": "ping"})

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Keep the worker stopped by SIGSTOP."""
        worker = self.status()["worker"]
        os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(worker, signal.SIGCONT)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A machine whose guest has written to its disk."""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    with Machine(log=tmp_path / "log") as machine, closing(machine.create_guest(5)) as guest:
        path = machine.attach(5, "xvda", f"aio:{tmp_path}/one")
        frontend = guest.connect(path, Wishes(persistent=True))
        frontend.write(0, b"a" * 4096)
        yield Site(machine, tmp_path, path, frontend)
        frontend.crash()


def give(site: Site, request: dict[str, Any]) -> tuple[threading.Thread, list[client.Answer]]:
    """Give an order in a thread, and return the thread and the list that will hold its one answer."""
    answers: list[client.Answer] = []

    def ask() -> None:
        try:
            answers.append(client.give_order(site.machine.control, {"vbd": "5/xvda", **request}, "it"))
        except client.ServiceError as problem:
            answers.append(problem.answer)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


@pytest.mark.parametrize("first", ["set", "snapshot"])
def test_a_set_and_a_snapshot_that_fails(site: Site, first: str) -> None:
    """A `set` and a failing `snapshot` at once: the second is refused as busy, and each caller gets its own outcome.

    The guest goes on with the chain that `set` reported.
    """
    taken = site.directory / "taken"
    taken.write_bytes(b"something")
    chains = {name: f"aio:{site.directory}/{name}" for name in ("one", "two")}
    requests: dict[str, dict[str, Any]] = {
        "set": {"verb": "set", "chain": chains["two"], "replace": True},
        "snapshot": {"verb": "snapshot", "file": str(taken), "format": "qcow2"},
    }
    second = "snapshot" if first == "set" else "set"
    with site.stopped():
        waiting, told = give(site, requests[first])
        until(lambda: site.under_way() == [first])
        refused, busy = give(site, requests[second])
        refused.join(20)
        number = site.status()["under_way"][0]["order"]
    waiting.join(20)
    chain = chains["two"] if first == "set" else chains["one"]
    site.frontend.write(8, b"b" * 4096)
    until(lambda: site.machine.store.read(f"{site.path.backend}/params") == chain)
    worker = site.status()["worker"]
    site.look_again()

    assert [(Code.BUSY, True)] == [(each.code, f"order {number}" in each.sentence) for each in busy]
    assert [Code.OK if first == "set" else Code.INVALID] == [each.code for each in told]
    assert [chain, chain] == [each.data["chain"] for each in told + busy] or first == "set"
    assert (chain, worker) == (site.status()["chain"], site.status()["worker"])
    assert b"b" * 4096 == site.frontend.read(8, 8)
    assert b"b" * 4096 == Path(chain.removeprefix("aio:")).read_bytes()[4096:8192]
    assert b"something" == taken.read_bytes()


def test_an_order_is_waited_for_longer_than_any_question(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the disk takes, the caller waits for the outcome and gets the chain for vm.cfg."""
    monkeypatch.setattr(client, "TIMEOUT_S", 0.2)
    results = []
    words = ("snapshot", "5/xvda", str(site.directory / "new.qcow2"))
    thread = threading.Thread(target=lambda: results.append(site.run(*words)))
    with site.stopped():
        thread.start()
        thread.join(1.0)
        assert thread.is_alive()
    thread.join(20)

    [(status, out, _)] = results
    assert (0, site.status()["chain"]) == (status, out.splitlines()[0])
    assert f"qcow2:{site.directory}/new.qcow2" == site.status()["chain"]


def test_whoever_gives_up_learns_later_what_became_of_it(site: Site) -> None:
    """With --timeout the order goes on: status 75, its number, and the chain that is in service until then."""
    with site.stopped():
        status, out, errors = site.run("snapshot", "5/xvda", f"{site.directory}/new.qcow2", "--timeout", "0.1")
        number = site.status()["under_way"][0]["order"]
        meanwhile = json.loads(site.run("orders", str(number), "--json")[1])["orders"][0]
    until(lambda: not site.under_way())
    [after] = json.loads(site.run("orders", str(number), "--json")[1])["orders"]

    assert (75, f"5/xvda is served by aio:{site.directory}/one\n") == (status, out)
    assert f"still under way, order {number}; see: xenbackend orders {number}" in errors
    assert ("under-way", "ok") == (meanwhile["code"], after["code"])
    assert (f"aio:{site.directory}/one", site.status()["chain"]) == (after["from"], after["to"])
    assert f"qcow2:{site.directory}/new.qcow2" == site.status()["chain"]


def test_an_order_outlives_the_service_that_took_it(site: Site) -> None:
    """If the service is killed during an order, the order outlives it, and the next service tells how it ended."""
    results = []
    words = ("set", "5/xvda", f"aio:{site.directory}/two", "--replace")
    thread = threading.Thread(target=lambda: results.append(site.run(*words)))
    service = site.machine.service_pid
    with site.stopped():
        thread.start()
        until(lambda: site.under_way() == ["set"])
        end = os.pidfd_open(service)
        os.kill(service, signal.SIGKILL)
        assert select.select([end], [], [], 20)[0]
        os.close(end)
    thread.join(40)
    site.frontend.write(8, b"b" * 4096)
    chain = site.status()["chain"]
    [entry] = [each for each in json.loads(site.run("orders", "--json")[1])["orders"] if each["verb"] == "set"]

    assert 1 == len(results)
    assert f"5/xvda is served by {chain}" == results[0][1].partition(";")[0].strip()
    assert (entry["code"] == "ok", chain == f"aio:{site.directory}/two") in ((True, True), (False, False))
    assert (results[0][0] == 0) == (entry["code"] == "ok")
    assert b"b" * 4096 == Path(chain.removeprefix("aio:")).read_bytes()[4096:8192]


def test_two_who_measure(site: Site) -> None:
    """A second measurement is refused; its caller may end the first one, whose caller gets the times until then."""
    first, measured = give(site, {"verb": "measure", "seconds": 3600})
    until(lambda: site.under_way() == ["measure"])
    refused, busy = give(site, {"verb": "measure", "seconds": 1})
    refused.join(20)
    site.frontend.write(8, b"b" * 4096)
    ended = site.run("latency", "5/xvda", "--layers", "--end")
    first.join(20)
    times = measured[0].data

    assert [(Code.BUSY, True)] == [(each.code, "measure is under way, order" in each.sentence) for each in busy]
    assert (0, "5/xvda: no measurement is running\n", "") == ended
    assert [Code.OK] == [each.code for each in measured]
    assert times["seconds"] < 3600
    assert 1 == sum(times["layers"][0]["operations"]["write"]["buckets"].values())
    assert [] == site.under_way()


@pytest.mark.parametrize("end", ["Ctrl-C", "--timeout", "SIGKILL of the service"])
def test_nobody_measures_for_nobody(site: Site, end: str) -> None:
    """If the caller of a measurement is lost, the measurement ends early, and the next one can begin."""
    command = [sys.executable, "-m", "xenbackend", "latency", "5/xvda", "--layers", "--interval", "3600"]
    if end == "--timeout":
        with pytest.raises(UnderWay) as pending:
            Client(site.machine.control, timeout_s=0.1).measure("5/xvda", 3600)
        number = pending.value.order or 0
    else:
        with subprocess.Popen([*command, "--socket", site.machine.control], stderr=subprocess.DEVNULL) as process:
            until(lambda: site.under_way() == ["measure"])
            number = site.status()["under_way"][0]["order"]
            if end == "Ctrl-C":
                process.send_signal(signal.SIGINT)
            else:
                os.kill(site.machine.service_pid, signal.SIGKILL)
            assert process.wait() != 0
    until(site.is_served, limit_s=120)  # the next service takes its time where the host is busy
    service = Client(site.machine.control)

    assert (Code.GONE if "service" in end else Code.OK) is service.wait(number).code
    assert 1.0 == service.measure("5/xvda", 1).seconds
