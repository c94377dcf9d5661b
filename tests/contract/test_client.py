"""What a program may rely on when it uses `xenbackend.client` with a service of the current release, with one of the
last release, and with the fake service of the command line's tests.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import pages
from tests.answering import answering, working
from tests.former_release import Site, unpack
from xenbackend.client import Client, Code, Failed, Invalid, UnderWay
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes
from xenbackend.supervisor.xenstore.toolstack import vbd_path

pytestmark = pytest.mark.slow  # each starts a service
KINDS = ["today", "fake", "former"]
VBD = "5/xvda"


@dataclass(frozen=True)
class Served:
    """A service that serves `chain` as 5/xvda. With a real service, `image` is the file below it."""

    kind: str
    service: Client
    chain: str
    machine: Machine | None = None
    image: Path = Path("/img")


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A service of each kind."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        if request.param == "fake":
            control = stack.enter_context(answering(tmp_path / "x", working))
            yield Served("fake", Client(control.path), "log:|aio:/img")
            return
        site = None
        if request.param == "former":
            if shutil.which("git") is None:
                pytest.skip("git is not installed")
            site = Site(tmp_path / "site", unpack(tmp_path / "former"))
            for name, value in site.environment.items():
                monkeypatch.setenv(name, value)
        machine = stack.enter_context(Machine())
        guest = machine.create_guest(5)
        stack.callback(guest.close)
        if site is None:
            path = machine.attach(5, "xvda", f"log:|aio:{image}")
        else:
            store = str(machine.directory / "xenstore.sock")
            site.run("attach", "--store", store, "--socket", machine.control, "5", "xvda", f"log:|aio:{image}")
            path = vbd_path(machine.store, 5, "xvda")
        frontend = guest.connect(path, Wishes())
        frontend.write(0, b"x" * 4096)
        yield Served(request.param, Client(machine.control), f"log:|aio:{image}", machine, image)
        frontend.crash()


def test_it_says_what_it_serves(served: Served) -> None:
    """A program gets the disks, with names, chain, layers and counters, and the service, with its process."""
    service, [disk] = served.service.service(), served.service.disks()

    assert service.pid > 0
    assert ("" == service.version) == (served.kind == "former")
    assert (VBD, 5, "xvda", "vbd/5/51712") == (disk.vbd, disk.domid, disk.device, disk.node)
    assert (served.chain, "Connected") == (disk.chain, disk.state)
    assert disk.worker
    if served.machine is not None:
        assert ["log:", f"aio:{served.image}"] == [each.layer for each in disk.layers]
        assert 1 << 20 == disk.layers[-1].size
    assert served.service.disk("5/xvda").node == disk.node


def test_orders_are_done_and_numbered(served: Served) -> None:
    """Each order returns its typed value once it is done. The current release lists it with that number."""
    service = served.service
    done = [service.pause(VBD), service.resume(VBD), service.policy(VBD, "enospc=pause"), service.upgrade(VBD)]
    changed = service.set(VBD, served.chain, replace=True)
    text = service.command(VBD, "log", "status")

    assert served.chain == changed.chain
    assert text.startswith("tracking")
    assert "enospc=pause" in service.policy(VBD).policy
    if served.kind == "today":
        numbers = [each.order for each in (*done, changed)]
        known = {each.number: (each.verb, each.code) for each in service.orders()}
        verbs = ["pause", "resume", "policy", "upgrade", "set"]
        assert [(verb, Code.OK) for verb in verbs] == [known[number or 0] for number in numbers]
        assert served.service.wait(changed.order or 0).to == served.chain
        assert len(numbers) == len({each.token for each in service.orders() if each.number in numbers} - {""})


def test_what_cannot_be_asked_is_an_error_with_a_sentence(served: Served) -> None:
    """A mistake of the caller is reported as one and changes nothing. Release 0.1.0 reports it as a failure."""
    if served.kind == "fake":
        pytest.skip("it takes everything")
    for ask in (
        lambda: served.service.set(VBD, "nosuch:x", replace=True),
        lambda: served.service.pause("77/xvda"),
        lambda: served.service.policy(VBD, "bla"),
    ):
        with pytest.raises(Failed if served.kind == "former" else Invalid) as caught:
            ask()
        assert re.search("nosuch|77|bla", caught.value.sentence)
    assert served.chain == served.service.disk(VBD).chain


def test_a_look_is_none_where_it_would_be_done(served: Served) -> None:
    """`plan` changes nothing. Release 0.1.0 would carry it out, and `set` unchecked: the client refuses both."""
    chain = f"aio:{served.image}"
    if served.kind == "former":
        for ask in (served.service.plan, served.service.set):
            with pytest.raises(Failed, match=r"release 0\.1\.0"):
                ask(VBD, chain)
    else:
        planned = served.service.plan(VBD, chain)
        assert (served.chain, chain) == (planned.chain, planned.before[-1].layer)
        assert chain in [each.layer for each in planned.after]
    assert served.chain == served.service.disk(VBD).chain


def test_an_order_outlives_the_wait_for_it(served: Served) -> None:
    """If an order outlasts the client's time-out, the client gets its number, and the order is still completed."""
    if served.kind != "today":
        pytest.skip("the last release knows no time, and the fake one is never late")
    worker = served.service.disk(VBD).worker
    try:
        number = Client(served.service.socket, timeout_s=0).upgrade(VBD).order
    except UnderWay as pending:
        number = pending.order
    order = served.service.wait(number or 0)

    assert (Code.OK, "upgrade") == (order.code, order.verb)
    assert served.service.disk(VBD).worker != worker


def test_the_page_has_the_services_verbs(served: Served) -> None:
    """The verbs that the service lists after an unknown one are those in the table of docs/client.md."""
    if served.kind != "today":
        pytest.skip("the page is about today's")
    assert served.machine is not None
    with pytest.raises(Invalid) as caught:
        Client(served.machine.control)._ask({"verb": "frob"})
    listed = caught.value.sentence.partition("the verbs are ")[2].split(", ")
    rows = pages.rows(pages.ROOT / "docs/client.md", "verb")

    assert sorted(listed) == sorted(each for verbs, *_ in rows for each in re.findall(r"`(\w+)`", verbs))
