"""The client: what it asks, returns and raises. tests/contract/test_client.py tests it with real services."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests import pages
from tests.answering import DISK, ENTRY, answering, working
from xenbackend import client
from xenbackend.client import Client, Failed, Invalid, ServiceError, UnderWay, Unreachable
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

PAGE = pages.ROOT / "docs/client.md"
JSON = pages.ROOT / "docs/json.md"
ORDERS: dict[str, Callable[[Client], Any]] = {
    "pause": lambda service: service.pause("5/xvda"),
    "resume": lambda service: service.resume("5/xvda"),
    "set": lambda service: service.set("5/xvda", "aio:/a", replace=True),
    "plan": lambda service: service.plan("5/xvda", "aio:/a"),
    "snapshot": lambda service: service.snapshot("5/xvda", "/new", image_format="vhd"),
    "resize": lambda service: service.resize("5/xvda"),
    "keep": lambda service: service.keep("5/xvda", "/new"),
    "drop": lambda service: service.drop("5/xvda", force=True),
    "policy": lambda service: service.policy("5/xvda", "enospc=report"),
    "upgrade": lambda service: service.upgrade("5/xvda"),
    "measure": lambda service: service.measure("5/xvda", 1.0),
    "end_measure": lambda service: service.end_measure("5/xvda"),
    "command": lambda service: service.command("5/xvda", "log", "get"),
    "stop": lambda service: service.stop(force=True),
}
QUESTIONS: dict[str, Callable[[Client], Any]] = {
    "service": lambda service: service.service(),
    "disks": lambda service: service.disks(looks=True),
    "disk": lambda service: service.disk("5/xvda"),
    "orders": lambda service: service.orders(),
    "order": lambda service: service.order(17),
    "wait": lambda service: service.wait(17),
}


def names(text: str) -> list[str]:
    """Return the words in backquotes."""
    return re.findall(r"`([^`]+)`", text)


def test_every_method_is_documented() -> None:
    """docs/client.md names each public method with its parameters, and this file tests each."""
    documented = {each for row in pages.rows(PAGE, "method") for each in names(row[0])}
    methods = inspect.getmembers(Client, inspect.isfunction)
    found = {}
    for name, method in methods:
        if not name.startswith("_"):
            parameters = list(inspect.signature(method).parameters.values())[1:]
            found[name] = [f"{'*' * (each.kind is each.VAR_POSITIONAL)}{each.name}" for each in parameters]

    assert {f"{name}({', '.join(words)})" for name, words in found.items()} == documented
    assert ORDERS.keys() | QUESTIONS.keys() == found.keys()


def test_every_error_is_documented() -> None:
    """Each code but OK has an exception, and the page lists both."""
    rows = {names(name)[0]: names(code)[0] for name, code, _ in pages.rows(PAGE, "exception")}

    assert {code.value for code in Code if code is not Code.OK} == set(rows.values())
    for name, code in rows.items():
        assert type(ServiceError(Answer(Code(code)))) is getattr(client, name)


def test_what_is_exported_is_documented() -> None:
    """Each name that a program may import is on the page."""
    text = PAGE.read_text()

    assert [] == [
        name for name in client.__all__ if not re.search(rf"\b{name}s?\b", text) and name not in ("Wait", "Code")
    ]


def test_fields_are_the_keys_of_the_json() -> None:
    """Service, Disk and Order have exactly the fields that json.md has keys for."""
    text = JSON.read_text()
    for cls, prefix in ((client.Service, "service."), (client.Disk, "vbds[]."), (client.Order, "orders[].")):
        section = text.partition("\n## orders\n" if cls is client.Order else "\n## status\n")[2].partition("\n## ")[0]
        keys = {each.removeprefix(prefix) for each in names(section) if each.startswith(prefix)}
        expected = {re.split(r"[.\[]", each)[0] for each in keys}

        assert expected | {"values"} == {each.name.rstrip("_") for each in fields(cls)}


def test_what_is_asked_is_the_documented_protocol(tmp_path: Path) -> None:
    """The page's table has exactly the verbs and keys that the client sends."""
    documented: dict[str, set[str]] = {}
    for verbs, keys, _ in pages.rows(PAGE, "verb"):
        documented |= {verb: set(names(keys)) for verb in names(verbs)}
    with answering(tmp_path / "x", working) as control:
        for ask in (*QUESTIONS.values(), *ORDERS.values()):
            ask(Client(control.path, timeout_s=5))
    sent: dict[str, set[str]] = {}
    for each in control.asked:
        sent.setdefault(each["verb"], set()).update(each.keys() - {"verb", "wait"})

    assert {**sent, "hotplug": set(), "detach": set()} == documented


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_that_takes_longer_is_a_typed_outcome(tmp_path: Path, name: str) -> None:
    """With a time limit, an order that takes longer raises UnderWay with its number; the service is told the limit."""

    def answer(request: dict[str, Any]) -> Answer:
        return working(request) if request["verb"] == "ping" else Answer(Code.UNDER_WAY, None, "still", 17)

    with answering(tmp_path / "x", answer) as control, pytest.raises(UnderWay, match="order 17") as caught:
        ORDERS[name](Client(control.path, timeout_s=2.5))

    assert (17, Code.UNDER_WAY) == (caught.value.order, caught.value.code)
    assert 2.5 == control.asked[-1]["wait"]


@pytest.mark.parametrize("name", [*ORDERS, *QUESTIONS])
def test_an_error_is_of_its_codes_class(tmp_path: Path, name: str) -> None:
    """An error has the class of its code, the sentence, the order's number and the chain in service, and can be
    pickled.
    """
    no = Answer(Code.FAILED, {"chain": "aio:/a"}, "it cannot be", 17)
    with answering(tmp_path / "x", lambda _: no) as control, pytest.raises(client.Failed) as caught:
        (ORDERS | QUESTIONS)[name](Client(control.path))
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - it is our own

    assert ("it cannot be", 17, "aio:/a") == (caught.value.sentence, caught.value.order, caught.value.chain)
    assert (client.Failed, no) == (type(again), again.answer)


@pytest.mark.parametrize("name", [*ORDERS, *QUESTIONS])
def test_no_service_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """If nothing listens, each method raises Unreachable."""
    monkeypatch.setattr("xenbackend.client.following.RETURN_S", 0.0)  # how long `wait` waits for a service
    with pytest.raises(Unreachable, match="systemctl start"):
        (ORDERS | QUESTIONS)[name](Client(str(tmp_path / "none")))


def test_a_disk_is_found_by_all_of_its_names(tmp_path: Path) -> None:
    """A disk is found by domain and device, by its guest's name, and by its place in xenstore; any other name is
    Invalid, also one that differs only by its kind.
    """
    other = {**DISK, "vbd": "6/xvda", "node": "vbd3/6/51712", "kind": "vbd3", "domid": 6, "guest": "web"}
    with answering(tmp_path / "x", lambda _: Answer(Code.OK, [DISK, other])) as control:
        service = Client(control.path)
        found = [service.disk(each).vbd for each in ("5/xvda", "mail/xvda", "5/51712", "vbd/5/51712", "vbd3/6/xvda")]
        there = "there are 5/xvda, 6/xvda"
        for wrong, said in (("7/xvda", there), ("vbd/6/xvda", there), ("frob", "is not a disk")):
            with pytest.raises(Invalid, match=said):
                service.disk(wrong)

        both = [each.vbd for each in service.disks("web/xvda", "5/xvda", "mail/xvda")]

    assert ["5/xvda"] * 4 + ["6/xvda"] == found
    assert ["5/xvda", "6/xvda"] == both


def test_a_release_that_looks_at_nothing_is_asked_for_no_exchange(tmp_path: Path) -> None:
    """Release 0.1.0, which tells no version, would carry out what is only planned, and exchange any file for any other.
    So the client asks it for neither, except for an exchange with `replace`.
    """

    def answer(request: dict[str, Any]) -> Answer:
        return Answer(Code.OK, {"pid": 1}) if request["verb"] == "ping" else working(request)

    with answering(tmp_path / "x", answer) as control:
        service = Client(control.path)
        for ask in (
            lambda: service.set("5/xvda", "aio:/a"),
            lambda: service.plan("5/xvda", "aio:/a"),
            lambda: service.plan("5/xvda", "aio:/a", replace=True),
        ):
            with pytest.raises(Failed, match=r"release 0\.1\.0.*systemctl restart xenbackend"):
                ask()
        refused = [each["verb"] for each in control.asked]
        service.set("5/xvda", "aio:/a", replace=True)

    assert ["ping"] * 3 == refused
    assert ["set"] == [each["verb"] for each in control.asked[3:]]


def test_the_environment_says_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is the argument, else that of XENBACKEND_SOCKET, else the packaged one, as for the command line."""
    monkeypatch.setenv("XENBACKEND_SOCKET", "/elsewhere")
    assert ("/here", "/elsewhere") == (Client("/here").socket, Client().socket)
    monkeypatch.delenv("XENBACKEND_SOCKET")
    assert "/run/xenbackend/control.sock" == Client().socket


def test_a_callback_hears_how_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback `waiting` is told how long a question or an order has taken so far."""
    monkeypatch.setattr("xenbackend.protocol.client.TICK_S", 0.01)
    for ask in (Client.service, lambda service: service.pause("5/xvda")):
        heard: list[float] = []
        enough = threading.Event()

        def note(seconds: float, heard: list[float] = heard, enough: threading.Event = enough) -> None:
            heard.append(seconds)
            if len(heard) == 3:
                enough.set()

        def answer(request: dict[str, Any], enough: threading.Event = enough) -> Answer:
            enough.wait(20)
            return working(request)

        with answering(tmp_path / f"x{len(list(tmp_path.iterdir()))}", answer) as control:
            ask(Client(control.path, waiting=note))
        assert sorted(heard) == heard
        assert len(heard) >= 3


def what_is_raised(ask: Callable[[], Any]) -> ServiceError | None:
    """Return the ServiceError that a call raises, or None; any other exception is a failure."""
    try:
        ask()
    except ServiceError as problem:
        return problem
    return None


LIES: list[Any] = [None, 1, "text", [1], [{}], [{**DISK, "domid": "5"}], [{**DISK, "layers": [7]}], {"pid": "x"},
                   [{**DISK, "counters": None}], [{**ENTRY, "code": "what"}], [{**DISK, "latency_histogram": [True]}],
                   [{**ENTRY, "who": []}], [{**DISK, "vbd": None, "node": 5}]]  # fmt: skip


@pytest.mark.parametrize("said", LIES)
@pytest.mark.parametrize("name", ["service", "disks", "disk", "orders", "order", "set", "upgrade", "stop"])
def test_a_service_that_lies_is_one_sentence(tmp_path: Path, name: str, said: Any) -> None:
    """Whatever an answer holds, the caller gets a typed value or a `ServiceError`."""

    def answer(request: dict[str, Any]) -> Answer:
        return working(request) if request["verb"] == "ping" and name != "service" else Answer(Code.OK, said)

    with answering(tmp_path / "x", answer) as control:
        problem = what_is_raised(lambda: (ORDERS | QUESTIONS)[name](Client(control.path)))

    assert problem is None or "not a service of this version" in problem.sentence


def test_what_a_newer_service_says_is_passed_on(tmp_path: Path) -> None:
    """Unknown keys of a newer service do no harm, and are in `values`."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK, [{**DISK, "colour": "red"}])) as control:
        [disk] = Client(control.path).disks()

    assert ("5/xvda", "red") == (disk.vbd, disk.values["colour"])


@pytest.mark.slow
def test_it_imports_little() -> None:
    """Importing the client imports neither the supervisor, nor drivers, nor libraries for the terminal."""
    text = "import sys, xenbackend.client; print(*sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
    rooms = {each.split(".")[1] for each in said.split() if each.startswith("xenbackend.")}

    assert {"client", "counters", "disks", "errors", "protocol"} == rooms
    assert {"asyncio", "rich", "structlog", "subprocess", "logging"}.isdisjoint(said.split())


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (QUESTIONS["order"], []),
        (QUESTIONS["disk"], [{**DISK, "node": "vbd/5/none"}]),
        (ORDERS["resize"], {"chain": "aio:/a", "layers": [5]}),
        (ORDERS["pause"], b"[" * 100_000 + b"\n"),
    ],
)
def test_what_no_service_says_is_an_error_like_any_other(
    tmp_path: Path, ask: Callable[[Client], Any], said: Any
) -> None:
    """Whatever answers at the socket, a program gets no exception but a `ServiceError`."""
    answer = said if isinstance(said, bytes) else Answer(Code.OK, said)
    with (
        answering(tmp_path / "x", lambda _: answer) as control,
        pytest.raises(Failed, match="is not a service of this version"),
    ):
        ask(Client(control.path))


def test_a_code_of_a_newer_release_is_a_failure_with_its_sentence(tmp_path: Path) -> None:
    """An unknown code, of a newer release, is a failure with its sentence, and does not hide other orders."""
    said = b'{"version": 1, "code": "new", "error": "no room", "data": null, "order": 18}\n'
    orders = Answer(Code.OK, [ENTRY, {**ENTRY, "number": 18, "code": "new"}])
    with answering(tmp_path / "x", lambda request: orders if request["verb"] == "orders" else said) as control:
        service = Client(control.path)
        with pytest.raises(Failed, match="no room") as caught:
            service.pause("5/xvda")
        found = service.orders()

    assert (18, Code.FAILED) == (caught.value.order, caught.value.code)
    assert [(Code.OK, "ok"), (Code.FAILED, "new")] == [(each.code, each.values["code"]) for each in found]
