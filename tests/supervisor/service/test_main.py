"""The service as a process: real workers, a simulated xenstored, signals, systemd's protocol, the daemon."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.privileges import MAY_COME_FIRST
from tests.supervisor.helpers import PATH, Clock, Kept, settle, write_like_libxl
from tests.until import until
from xenbackend.errors import ConfigError
from xenbackend.kernel.process import AHEAD
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.client import ServiceError, call
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service import parent
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.ledger import KEPT, Ledger
from xenbackend.supervisor.service.main import Service
from xenbackend.supervisor.service.notify import Notifier
from xenbackend.supervisor.service.server import Peer, Reply
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.vbds import Vbds
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store
from xenbackend.supervisor.xenstore.toolstack import Attachment, attach, detach

pytestmark = pytest.mark.slow  # every one starts a service

_ROOT = Path(__file__).parents[2]
_COMMAND = (sys.executable, "-c", "import sys; from xenbackend.cli.main import main; sys.exit(main())")


class Systemd:
    """systemd's end of the notify socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(30)
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "100000"}
        self.heard: list[str] = []

    def hears(self, beginning: str) -> bool:
        """Wait for one more message, and return whether any so far began like this."""
        self.heard.append(self._socket.recv(1000).decode())
        return any(each.startswith(beginning) for each in self.heard)

    def wait_for(self, state: str) -> None:
        """Wait until the service has said `state`."""
        while state not in self.heard:
            self.heard.append(self._socket.recv(1000).decode())

    def listen_until(self, end: int) -> None:
        """Receive messages until a process has ended: a service waits if nobody receives its messages."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(end, select.POLLIN)
        while all(fd != end for fd, _ in poll.poll(30_000) or [(end, 0)]):
            self.heard.append(self._socket.recv(1000).decode())

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def let_go(self) -> None:
        """Stop listening. The kernel closes the descriptors that were to be kept, as nobody has received them."""
        self.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    """A notify socket that is listened to."""
    systemd = Systemd(tmp_path / "notify")
    yield systemd
    systemd.close()


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), **more}


def _start(xenstored: Xenstored, control_socket: Path, systemd: Systemd, *more: str) -> subprocess.Popen[str]:
    service = _begin(xenstored, control_socket, systemd, *more)
    systemd.wait_for("READY=1")
    return service


def _begin(xenstored: Xenstored, control_socket: Path, systemd: Systemd, *more: str) -> subprocess.Popen[str]:
    arguments = ("run", "--store", xenstored.address, "--socket", str(control_socket), "--log", "journal", *more)
    return subprocess.Popen(
        [*_COMMAND, *arguments], env=_environment(**systemd.environment), stderr=subprocess.PIPE, text=True
    )


def _stop(service: subprocess.Popen[str]) -> str:
    service.send_signal(signal.SIGTERM)
    _, log = service.communicate(timeout=30)
    assert 0 == service.returncode
    return log


def test_a_service_from_start_to_stop(xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path) -> None:
    """A real worker opens the chain. At SIGTERM the service ends the worker, leaves the states as they are, and removes
    its own nodes and socket.
    """
    control_socket = tmp_path / "control.sock"
    service = _start(xenstored, control_socket, systemd)
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    [known] = call(str(control_socket), {"verb": "status"}).data
    pid = call(str(control_socket), {"verb": "ping"}).data["pid"]
    systemd.wait_for("WATCHDOG=1")
    systemd.wait_for("STATUS=serving 1 vbds")
    log = _stop(service)
    systemd.wait_for("STOPPING=1")

    assert service.pid == pid
    assert ("InitWait", "", 1 << 30) == (known["state"], known["error"], known["layers"][0]["size"])
    assert not Path(f"/proc/{known['worker']}").exists()
    assert "2" == toolstack.read(f"{PATH.backend}/state")
    assert [] == toolstack.directory("/local/domain/0/xenbackend")
    assert not control_socket.exists()
    assert {"<6>"} == {line[:3] for line in log.splitlines()}


def test_systemd_hears_that_a_service_is_ready_once_it_listens(
    xenstored: Xenstored, systemd: Systemd, tmp_path: Path
) -> None:
    """A service that starts while systemd takes no messages serves, and tells systemd so as soon as it takes some."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as others:
        others.connect(systemd.environment["NOTIFY_SOCKET"])
        with suppress(BlockingIOError):
            while others.send(b"another unit's"):
                pass
    del systemd.environment["WATCHDOG_USEC"]
    control_socket = tmp_path / "control.sock"
    service = _begin(xenstored, control_socket, systemd)

    def answers() -> bool:
        with suppress(ServiceError):
            return call(str(control_socket), {"verb": "ping"}).code is Code.OK
        return False

    until(answers)
    systemd.wait_for("READY=1")
    _stop(service)

    assert set(systemd.heard) <= {"another unit's", "READY=1", "STATUS=serving 0 vbds"}


def test_requests_that_cannot_be_are_answered(xenstored: Xenstored, systemd: Systemd, tmp_path: Path) -> None:
    """An unknown verb, an unknown vbd or a missing argument is answered with a code and a sentence, and the service
    goes on.
    """
    control_socket = tmp_path / "control.sock"
    service = _start(xenstored, control_socket, systemd)
    expected = {
        "unknown request; the verbs are ping, status, orders, hotplug, stop, set,": {"verb": "frob"},
        "unknown request; the verbs are ping": {"verb": ["ping"]},
        "unknown request": {},
        "there is no disk '5/xvdz' in service; none is": {"verb": "command", "vbd": "5/xvdz", "layer": "log"},
        "'5' is not a disk": {"verb": "pause", "vbd": "5"},
        "the request needs vbd, a text": {"verb": "pause", "vbd": 5},
        "there is no disk '5/xvda' in service": {"verb": "status", "vbd": "5/xvda"},
        "there is no order 7 among the last 1000": {"verb": "orders", "order": 7},
        "there is no order 'x' among": {"verb": "orders", "order": "x"},
        "the action of hotplug must be add": {"verb": "hotplug", "action": "remove", "path": "x"},
        "'x' is not the directory of a vbd of domain 0": {"verb": "hotplug", "action": "add", "path": "x"},
    }
    answers = {}
    for sentence, request in expected.items():
        with pytest.raises(ServiceError) as caught:
            call(str(control_socket), request)
        answers[sentence] = caught.value.answer
    pinged = call(str(control_socket), {"verb": "ping"}).data
    _stop(service)

    assert {Code.INVALID} == {each.code for each in answers.values()}
    assert [] == [each.sentence for sentence, each in answers.items() if sentence not in each.sentence]
    assert (service.pid, 0, 0) == tuple(pinged[key] for key in ("pid", "bugs", "breaches"))


@pytest.mark.parametrize("uid", [0, 65533])
def test_who_is_not_root_changes_nothing(uid: int) -> None:
    """A member of the group that the settings name may only use verbs that change nothing; all others are for root."""
    given: list[str] = []
    answers: list[Answer] = []
    verbs = {verb: lambda request, *_: given.append(request["verb"]) for verb in ("ping", "orders", "stop", "set")}
    service: Any = SimpleNamespace(_verbs=verbs, _leaves=False)
    for verb in verbs:
        Service._answer(service, {"verb": verb}, Peer(1, uid, "x"), answers.append)

    assert (["ping", "orders", "stop", "set"] if uid == 0 else ["ping", "orders"]) == given
    refused = [f"{verb} changes something, which only root may do" for verb in ("stop", "set")]
    assert ([] if uid == 0 else refused) == [each.sentence for each in answers]


@pytest.mark.parametrize("how", ["replaced", "killed"])
def test_a_service_that_is_kept_is_followed_by_another_one(
    xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path, how: str
) -> None:
    """With --keep a service that is killed, or replaced at SIGHUP, has a successor that takes over its workers. At
    SIGTERM the workers are drained and everything ends. A worker gets none of the kept descriptors.
    """
    control_socket = tmp_path / "control.sock"
    keeping = _start(xenstored, control_socket, systemd, "--keep")
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    [known] = call(str(control_socket), {"verb": "status"}).data
    service = call(str(control_socket), {"verb": "ping"}).data["pid"]
    for _ in range(2):
        systemd.heard.clear()
        if how == "killed":
            os.kill(call(str(control_socket), {"verb": "ping"}).data["pid"], signal.SIGKILL)
        else:
            keeping.send_signal(signal.SIGHUP)
        systemd.wait_for("READY=1")
        until(lambda: _status(control_socket)["phase"] == "open")
    [after] = call(str(control_socket), {"verb": "status"}).data
    successor = call(str(control_socket), {"verb": "ping"}).data["pid"]
    descriptors = [_links(pid) for pid in (after["worker"], successor)]
    end = os.pidfd_open(after["worker"])
    until(lambda: os.getpriority(os.PRIO_PROCESS, successor) == os.getpriority(os.PRIO_PROCESS, 0))
    session = os.getsid(successor)
    log = _stop(keeping)
    assert select.select([end], [], [], 0)[0]  # another process is its parent by now, and may not have noticed yet
    os.close(end)

    assert known["worker"] == after["worker"]
    assert ("open", "", "null:1G") == (after["phase"], after["error"], after["layers"][0]["layer"])
    journals = [each.count("/memfd:xenbackend-journal (deleted)") for each in descriptors]
    assert [1, 2] == journals  # a mapping has a descriptor of its own
    assert (True, successor) == (service != successor, session)
    assert 2 == log.count("taking over from an earlier service")


def test_nothing_is_kept_twice(xenstored: Xenstored, systemd: Systemd, tmp_path: Path) -> None:
    """The former descriptor of a name is removed before another is kept: systemd would keep both, and hand over the
    former one too.
    """
    systemd.environment["FDSTORE"] = "8"
    _stop(_start(xenstored, tmp_path / "control.sock", systemd))
    names = {line.partition("=")[2] for said in systemd.heard for line in said.splitlines() if "FDNAME" in line}
    kept = [said.split("=")[0] for name in names for said in systemd.heard if f"FDNAME={name}" in said.splitlines()]

    assert {"control", "settings", KEPT} == names
    assert ["FDSTOREREMOVE", "FDSTORE"] * 3 == [each for each in kept if each in ("FDSTOREREMOVE", "FDSTORE")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("frob = 1", "settings.toml:1: there is no setting frob"),
        ('socket = "/nowhere/control.sock"', "/nowhere/control.sock: cannot listen: No such file or directory"),
        ('socket = "/tmp"', "/tmp: cannot listen there: it is not a socket"),
        (f'socket = "/tmp/{"x" * 200}"', "cannot listen there: AF_UNIX path too long"),
        ('host = "xenbackend.kernel.xne"', "host: there is no module 'xenbackend.kernel.xne'"),
    ],
    ids=["unknown", "no directory", "no socket", "too long", "host"],
)
def test_a_mistake_in_the_settings_harms_no_disk(
    xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path, text: str, sentence: str
) -> None:
    """If a service finds unusable settings when it replaces another, it goes by the former service's settings, and says
    so in its log and to systemd. If no disk is in service, it ends with the error.
    """
    control_socket, config = tmp_path / "control.sock", tmp_path / "settings.toml"
    right = f'socket = "{control_socket}"\nserve = "all"\n'
    config.write_text(right)
    command = [*_COMMAND, "run", "--keep", "--config", str(config), "--store", xenstored.address, "--log", "journal"]
    keeping = subprocess.Popen(command, env=_environment(**systemd.environment), stderr=subprocess.PIPE, text=True)
    systemd.wait_for("READY=1")
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    before = _status(control_socket)["worker"]
    config.write_text(f"{text}\n" if "socket" in text else f"{text}\n{right}")
    systemd.heard.clear()
    keeping.send_signal(signal.SIGHUP)
    systemd.wait_for("READY=1")
    until(lambda: _status(control_socket)["phase"] == "open")
    after = _status(control_socket)["worker"]
    until(lambda: systemd.hears("STATUS=serving 1 vbds by the former service's settings: "))
    detach(toolstack, PATH)
    until(lambda: not call(str(control_socket), {"verb": "status"}).data)
    keeping.send_signal(signal.SIGHUP)
    _, log = keeping.communicate(timeout=30)

    assert before == after
    assert 1 == log.count("the settings are invalid; those of the former service stay in force")
    assert 2 == keeping.returncode
    assert 2 == log.count(sentence)  # by the service that goes on, and by the one that ends


@pytest.mark.skipif(not MAY_COME_FIRST, reason="we may not come before others")
def test_a_service_comes_before_others_while_it_starts(tmp_path: Path) -> None:
    """A starting service has a higher priority, because guests may wait for it. The test of --keep checks that this
    ends once it serves.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as store:
        store.bind(str(tmp_path / "store"))
        store.listen()
        store.settimeout(30)
        arguments = ("run", "--store", str(tmp_path / "store"), "--socket", str(tmp_path / "control"))
        with subprocess.Popen([*_COMMAND, *arguments], env=_environment()) as service:
            asks, _ = store.accept()  # it asks for its domain, and waits for the answer
            seen = os.getpriority(os.PRIO_PROCESS, service.pid)
            service.kill()
        asks.close()

    assert os.getpriority(os.PRIO_PROCESS, 0) - AHEAD == seen


@pytest.mark.parametrize(("number", "stays"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_how_a_service_ends_its_workers(
    xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path, number: int, *, stays: bool
) -> None:
    """At SIGTERM a service with a keeper leaves its workers to the next service; at SIGINT it always drains them."""
    control_socket = tmp_path / "control.sock"
    systemd.environment["FDSTORE"] = "16"
    del systemd.environment["WATCHDOG_USEC"]  # nobody reads the socket, which must have room for what is kept
    service = _start(xenstored, control_socket, systemd)
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    worker = _status(control_socket)["worker"]
    end, end_of_service = os.pidfd_open(worker), os.pidfd_open(service.pid)
    service.send_signal(number)
    if not stays:  # whoever reads the messages gets the descriptors
        systemd.listen_until(end_of_service)
    service.wait(30)
    os.close(end_of_service)
    ended = bool(select.select([end], [], [], 0 if stays else 30)[0])
    systemd.let_go()
    assert select.select([end], [], [], 30)[0]
    os.close(end)
    service.communicate()  # the worker has the same stream

    assert (0, stays) == (service.returncode, not ended)
    assert "2" == toolstack.read(f"{PATH.backend}/state")


def test_a_service_that_finds_a_newer_one_s_disks_rests(systemd: Systemd) -> None:
    """A service that finds disks of a newer version says so at once and then rests, so that it is not restarted at
    once. A signal ends the rest.
    """
    memory = os.memfd_create("journal")
    environment = _environment(**systemd.environment, FDSTORE="64", REFUSED_REST_S="100")
    pid, pidfd = parent._spawn([*_COMMAND, "run"], {"vbd-0-5-51712.journal.9": memory}, environment)
    os.close(memory)
    while not any("STATUS=vbd/5/51712 is served by a newer version" in each for each in systemd.heard):
        systemd.heard.append(systemd._socket.recv(1000).decode())
    rests = not select.select([pidfd], [], [], 0)[0]
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)

    assert (True, -signal.SIGTERM) == (rests, status)


@pytest.mark.parametrize("kept", [(), ("newer",), ("disk",), ("disk", "settings")])
def test_a_service_that_cannot_begin_harms_no_disk(
    xenstored: Xenstored, systemd: Systemd, tmp_path: Path, capfd: pytest.CaptureFixture[str], kept: tuple[str, ...]
) -> None:
    """A service whose place another one has taken, or that finds disks of a newer version, ends with the status of a
    mistake only if no disk is in service: after that status, nothing starts it again, and what is kept of the disks is
    dropped.
    """
    settings = {"socket": str(tmp_path / "control.sock"), "store": xenstored.address, "serve": "all"}
    made = {each: os.memfd_create(each) for each in ("newer", "disk", "settings")}
    os.write(made["settings"], json.dumps({**asdict(Settings()), **settings}).encode())
    names = {"newer": "vbd-0-5-51712.journal.9", "disk": "vbd-0-5-51712.journal.3", "settings": "settings"}
    command = [*_COMMAND, "run", "--socket", settings["socket"], "--store", xenstored.address]
    environment = _environment(**systemd.environment, FDSTORE="64")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(settings["socket"])
        other.listen()
        pid, pidfd = parent._spawn(command, {names[each]: made[each] for each in kept}, environment)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd in (pidfd, *made.values()):
        os.close(fd)

    assert (1 if kept else 2) == status
    sentence = "served by a newer version" if "newer" in kept else "another xenbackend service listens there already"
    assert sentence in capfd.readouterr().err


def test_orders_go_to_a_vbd(xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path) -> None:
    """Each order reaches the disk that it names. Its answer has the order's number, by which the ledger finds it
    afterwards. `stop` ends everything.
    """
    control_socket = tmp_path / "control.sock"
    service = _start(xenstored, control_socket, systemd)
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))

    def ask(verb: str, **more: Any) -> Answer:
        return call(str(control_socket), {"verb": verb, "vbd": "5/xvda", **more}, 30)

    first = _status(control_socket)["worker"]
    answers = [ask("pause", by="nobody")]
    paused_by = _status(control_socket)["paused_by"]
    answers += [ask("resume"), ask("policy", policy="write=report"), ask("upgrade")]
    answers += [ask("set", chain="null:2G", replace=True), ask("resize")]
    answers += [ask("set", chain="null:3G", replace=True, dry_run=True)]
    known = _status(control_socket)
    with pytest.raises(ServiceError, match="unknown request"):
        ask("frob")
    with pytest.raises(ServiceError, match="cannot shrink") as caught:
        ask("set", chain="null:1G", replace=True)
    ask("policy")  # what only reads is no order
    attached, *orders = call(str(control_socket), {"verb": "orders"}).data
    last = call(str(control_socket), {"verb": "orders", "order": orders[-1]["number"]}).data
    stopped = call(str(control_socket), {"verb": "stop"})
    log = service.communicate(timeout=30)[1]

    assert [each.order for each in answers] == [each["number"] for each in orders[:-1]]
    assert (caught.value.answer.order, last) == (orders[-1]["number"], orders[-1:])
    who = {"pid": os.getpid(), "uid": os.getuid(), "command": Path("/proc/self/comm").read_text().rstrip()}
    assert [who] * 8 == [each["who"] for each in orders]
    assert f"uid {who['uid']}, pid {who['pid']}, {who['command']}" == paused_by
    assert ["ok"] * 7 == [each["code"] for each in orders[:-1]]
    assert ("set --dry-run", "null:2G", "null:3G") == tuple(orders[6][key] for key in ("verb", "from", "to"))
    assert ("5/xvda", "null:1G", "null:2G") == tuple(orders[4][key] for key in ("vbd", "from", "to"))
    assert first != known["worker"]
    assert ("null:2G", "", 2 << 30) == (known["chain"], known["error"], known["layers"][0]["size"])
    assert ({"pid": service.pid, "untold": []}, 0) == (stopped.data, service.returncode)
    assert 10 == sum(" order=" in line for line in log.splitlines())
    assert ("attach", "5/xvda", "null:1G", "ok") == tuple(attached[key] for key in ("verb", "vbd", "to", "code"))
    former = "enospc=pause,read=retry 3 every 1s,write=report,flush=pause,away=pause"
    assert (former, "write=report") == (orders[2]["from"], orders[2]["to"])


def test_a_detach_is_among_the_orders(xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path) -> None:
    """The ledger has each detach with who gave it, and closes it once the disk is gone; a detach of a disk that does
    not exist is not recorded.
    """
    control_socket = tmp_path / "control.sock"
    service = _start(xenstored, control_socket, systemd)
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    detach(toolstack, PATH, service=str(control_socket))
    with pytest.raises(ConfigError, match="xenbackend serves no disk 5/xvda"):
        detach(toolstack, PATH, service=str(control_socket))

    def orders() -> list[tuple[str, ...]]:
        found = call(str(control_socket), {"verb": "orders"}).data
        return [(each["verb"], each["vbd"], each["code"]) for each in found]

    until(lambda: orders()[-1][-1] == "ok")
    found = orders()
    _stop(service)

    assert [("attach", "5/xvda", "ok"), ("detach", "5/xvda", "ok")] == found


def test_whoever_waits_no_longer_is_told_the_order(
    xenstored: Xenstored, toolstack: Store, systemd: Systemd, tmp_path: Path
) -> None:
    """A client whose time is up gets the number of its order, which goes on; its outcome can be asked for by that
    number.
    """
    control_socket = tmp_path / "control.sock"
    service = _start(xenstored, control_socket, systemd)
    attach(toolstack, Attachment(PATH, "null:1G"), str(control_socket))
    worker = _status(control_socket)["worker"]
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(ServiceError) as caught:
        call(str(control_socket), {"verb": "pause", "vbd": "5/xvda", "wait": 0.05})
    number = caught.value.answer.order

    def order() -> dict[str, Any]:
        return dict(call(str(control_socket), {"verb": "orders", "order": number}).data[0])

    before = order()["code"]
    os.kill(worker, signal.SIGCONT)
    until(lambda: order()["ended"] is not None)
    after = order()["code"]
    _stop(service)

    assert (Code.UNDER_WAY, 2, "under-way", "ok") == (caught.value.answer.code, number, before, after)


def test_a_service_that_is_being_replaced_does_not_say_that_there_is_no_disk(
    xenstored: Xenstored, kept: Kept, tmp_path: Path
) -> None:
    """A service that has left its disks to its successor says that it is going, and not that there is no such disk."""
    settings = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock"))
    service = Service(settings, Notifier({}), kept.keeper())
    service._stop(signal.SIGTERM)
    answers: list[Answer] = []
    for request in ({"verb": "resume", "vbd": "5/xvda"}, {"verb": "status"}, {"verb": "ping"}):
        service._answer(request, Peer(1, 0, "test"), answers.append)
    service._close()

    assert [Code.GONE, Code.GONE, Code.OK] == [each.code for each in answers]


def test_a_service_that_is_stopping_takes_no_order(xenstored: Xenstored, kept: Kept, tmp_path: Path) -> None:
    """A stopping service refuses orders, since what it noted of a disk would be forgotten; questions are still
    answered.
    """
    settings = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock"))
    service = Service(settings, Notifier({}), kept.keeper())
    service._stop(signal.SIGINT)
    answers: list[Answer] = []
    for request in ({"verb": "pause", "vbd": "5/xvda"}, {"verb": "status"}):
        service._answer(request, Peer(1, 0, "test"), answers.append)
    service._close()

    assert [(Code.GONE, "the service is stopping"), (Code.OK, "")] == [(each.code, each.sentence) for each in answers]


def test_a_parent_that_ends_during_a_replacement_has_the_workers_drained(
    xenstored: Xenstored, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a service that is being replaced still waits for an exchange, and its parent ends, too, it drains its workers:
    nobody would keep what the next service needs.
    """
    settings = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock"))
    service = Service(settings, Notifier({}), kept.keeper())
    monkeypatch.setattr(service, "_exchanging", lambda: [VbdPath("vbd", 0, 5, 51712)])
    service._stop(signal.SIGTERM)
    waits = (service._leaves, service._has_let_go)
    service._stop(signal.SIGINT)
    ends = (service._leaves, service._has_let_go, service._leave_at.due)
    service._close()

    assert ((True, False), (False, True, None)) == (waits, ends)
    assert [] == [name for name in kept.fds if name.startswith("orders")]


def test_a_parent_that_ends_after_the_workers_were_let_go_has_everything_forgotten(
    xenstored: Xenstored, kept: Kept, tmp_path: Path
) -> None:
    """If the parent of a service that has let its workers go ends, too, nothing is left of the service: no socket, and
    nothing at the keeper.
    """
    settings = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock"))
    service = Service(settings, Notifier({}), kept.keeper())
    service._stop(signal.SIGTERM)
    has_let_go = service._has_let_go
    service._stop(signal.SIGINT)
    service._close()

    assert (True, False) == (has_let_go, Path(settings.socket).exists())
    assert [] == [name for name in kept.fds if name.startswith(("orders", "control"))]


def test_whoever_stops_a_service_that_is_stopping_waits_for_the_same_end(
    xenstored: Xenstored, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that would lose data is refused, except during a forced stop: then it waits for the same end."""

    def refuse(_vbds: Vbds) -> None:
        raise ConfigError("what the guests have written would be lost")

    monkeypatch.setattr(Vbds, "refuse_to_lose", refuse)
    settings = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock"))
    service = Service(settings, Notifier({}), kept.keeper())
    answers: list[Answer] = []
    for request in ({"verb": "stop"}, {"verb": "stop", "force": True}, {"verb": "stop"}):
        service._answer(request, Peer(1, 0, "test"), Reply(service._loop, answers.append))
    before = [each.code for each in answers]
    service._close()

    assert [Code.INVALID] == before
    assert [Code.INVALID, Code.OK, Code.OK] == [each.code for each in answers]


def test_questions_about_disks_wait_until_all_are_found(xenstored: Xenstored, toolstack: Store, tmp_path: Path) -> None:
    """Requests about disks are answered only after all disks have been found, so that none seems to be missing.
    Questions about the service are answered at once.
    """
    write_like_libxl(toolstack, params="odd:")  # a chain that no worker has to open
    settings, clock = Settings(store=xenstored.address, socket=str(tmp_path / "control.sock")), Clock()
    service = Service(settings, Notifier({}), Keeper({}), clock=clock)
    clients = {verb: socket.socket(socket.AF_UNIX) for verb in ("status", "pause", "ping", "orders")}
    for verb, client in clients.items():
        client.connect(settings.socket)
        client.sendall(json.dumps({"verb": verb, "vbd": "5/xvda"}).encode() + b"\n")
    settle(service._loop)
    at_once = select.select(clients.values(), [], [], 0)[0]
    service._registry.start()
    for _ in range(2):
        settle(service._loop)
        clock.time += 1
    given = [each["verb"] for each in service._ledger.entries()]
    status = json.loads(clients["status"].recv(65536))["data"]
    service._stop(signal.SIGINT)
    service._loop.run_until(lambda: not service._registry.vbds)
    service._close()
    for client in clients.values():
        client.close()

    assert [clients["ping"], clients["orders"]] == at_once
    assert (["5/xvda"], ["pause"]) == ([each["vbd"] for each in status], given)


def _status(control_socket: Path) -> dict[str, Any]:
    [known] = call(str(control_socket), {"verb": "status"}).data
    return dict(known)


def _links(pid: int) -> list[str]:
    """Return where the links to a process's descriptors lead."""
    return [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]


def test_what_is_wrong_is_said_before_the_daemon_detaches(tmp_path: Path) -> None:
    """With --detach, if xenstore cannot be reached, the operator sees one sentence and exit status 1."""
    run = subprocess.run(
        [*_COMMAND, "run", "--detach", "--store", str(tmp_path / "none"), "--socket", str(tmp_path / "control.sock")],
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (1, 1) == (run.returncode, len(run.stderr.splitlines()))
    assert f"xenstore at {tmp_path / 'none'}" in run.stderr


def test_the_daemon_serves_and_stops(xenstored: Xenstored, tmp_path: Path) -> None:
    """With --detach the command returns at once. The pid file names the daemon, which is the parent that starts the
    service and keeps its descriptors. SIGTERM ends both.
    """
    pid_file, control_socket, log_file = (tmp_path / name for name in ("pid", "control.sock", "log"))
    subprocess.run(
        [
            *_COMMAND, "run", "--detach", "--store", xenstored.address, "--socket", str(control_socket),
            "--pid-file", str(pid_file), "--log-file", str(log_file), "--log", "journal",
        ],
        env=_environment(), check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    with Store(xenstored.address) as store:
        _wait_until_served(store, control_socket)
    pid = int(pid_file.read_text())
    end = os.pidfd_open(pid)
    service = call(str(control_socket), {"verb": "ping"}).data["pid"]
    assert f"PPid:\t{pid}\n" in Path(f"/proc/{service}/status").read_text()
    os.kill(pid, signal.SIGTERM)
    ended, _, _ = select.select([end], [], [], 30)
    os.close(end)

    assert ended
    assert not pid_file.exists()
    assert not Path(f"/proc/{service}").exists()
    assert not Path(f"{control_socket}.keep").exists()
    assert "service: stopped" in log_file.read_text()


def _wait_until_served(store: Store, control_socket: Path) -> None:
    """Wait until the daemon has written to xenstore: it takes up a disk that we make."""
    write_like_libxl(store)
    store.watch(f"{PATH.backend}/state", "state")
    while "2" != store.read(f"{PATH.backend}/state"):
        assert select.select([store.fileno()], [], [], 30)[0]
        store.events()
    assert control_socket.exists()


@pytest.mark.parametrize("wrong", ["directory", "running", "socket"])
def test_no_daemon_that_could_not_run(xenstored: Xenstored, tmp_path: Path, wrong: str) -> None:
    """An unusable pid file, a pid file that names a running service, and an unusable path for the socket are reported
    before the command detaches.
    """
    pid_file, control_socket = tmp_path / "pid", tmp_path / "control.sock"
    sleeper = subprocess.Popen([sys.executable, "-c", "input()", "xenbackend"], stdin=subprocess.PIPE)
    pid_file.write_text(f"{sleeper.pid if wrong == 'running' else 2**22}\n")
    if wrong == "directory":
        pid_file = tmp_path
    if wrong == "socket":
        control_socket = tmp_path / ("x" * 120)
    run = subprocess.run(
        [
            *_COMMAND, "run", "--detach", "--store", xenstored.address, "--socket", str(control_socket),
            "--pid-file", str(pid_file), "--log-file", str(tmp_path / "log"),
        ],
        env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    sleeper.communicate(b"\n")

    assert (2, 1) == (run.returncode, len(run.stderr.splitlines()))
    expected = {"directory": "cannot write the pid there", "running": f"runs as process {sleeper.pid}"}
    assert expected.get(wrong, "cannot listen there") in run.stderr


def test_orders_of_a_former_service_wait_for_a_vbd_that_is_being_taken_over(descriptors: None) -> None:
    """Each vbd goes on with its orders of the former service once it has been taken over, without waiting for other
    vbds. Orders of a vbd that is gone are closed, and orders of this service are left alone.
    """
    del descriptors
    clock = Clock()
    loop = Reactor(clock)
    ledger = Ledger(Keeper({}))
    other = VbdPath("vbd", 0, 6, 51712)
    known, late, lost = (ledger.open("pause", vbd, {}, {}) for vbd in (PATH.disk, other.disk, "7/xvda"))
    gone_on: list[int] = []
    orders = SimpleNamespace(go_on=lambda _verb, _given, number, _reply: gone_on.append(number))
    vbds: dict[Any, Any] = {PATH: SimpleNamespace(path=PATH, orders=orders)}
    registry = SimpleNamespace(has_taken_over=False, vbds=vbds)
    service: Any = SimpleNamespace(_registry=registry, _loop=loop, _ledger=ledger, _give=Service._give)
    service._go_on_with_orders = partial(Service._go_on_with_orders, service)
    service._go_on_with_orders(ledger.entries())
    settle(loop)
    before = [*gone_on, *(each["code"] for each in ledger.entries())]
    new = ledger.open("pause", PATH.disk, {}, {})
    registry.has_taken_over = True
    vbds[other] = SimpleNamespace(path=other, orders=orders)
    clock.time += 1
    settle(loop)
    codes = {each["number"]: each["code"] for each in ledger.entries()}
    ledger.leave()
    loop.close()

    assert [known, *["under-way"] * 3] == before
    assert {known: "under-way", late: "under-way", lost: "gone", new: "under-way"} == codes
    assert [known, late] == gone_on
