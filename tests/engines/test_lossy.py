"""The driver nbd over a network that loses packets; the server is in a network namespace."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.guest import SIZE, Guest
from tests.engines.lossy import LossyLink
from tests.until import until
from xenbackend.embedded.machine import Machine


@pytest.fixture
def link(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LossyLink]:
    """A link that loses one packet in a thousand, with a server at its far end."""
    if shutil.which("nbdkit") is None:
        pytest.skip("there is no nbdkit here")
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    # nbdkit 1.32 aborts if a client dies with requests in flight, so it is restarted, as a systemd unit would do
    serve = f"while :; do nbdkit -f --threads=1 -i ADDRESS -p 10809 file {image}; done"
    with LossyLink(["sh", "-c", serve], 0.001, request.config.getoption("--seed")) as link:
        until(lambda: _listens(link.far))
        yield link


@pytest.fixture
def guest(machine: Machine, link: LossyLink, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest whose server is behind the link."""
    with ExitStack() as stack:
        yield Guest(machine, f"nbd:{link.far}:10809,drain=0s,timeout=2s", request.config.getoption("--seed"), stack)


def test_packets_are_lost(guest: Guest, link: LossyLink) -> None:
    """A guest sees no error if some of its packets are lost and its worker dies meanwhile."""
    for _ in range(2):
        guest.load.run(100)
        guest.load.top_up()
        guest.kill()
    while not link.lost:
        guest.load.run(100)
    guest.end()


def test_a_network_that_goes_silent(guest: Guest, link: LossyLink) -> None:
    """If no packets come through, the guest waits and `status` says why. When they do again, it goes on."""
    guest.load.run(50)
    guest.load.finish()
    link.loss = 1.0
    guest.load.top_up()
    until(lambda: "the server has not answered anything for 2 s" in guest.connection())
    until(lambda: "the disk's server is away" in guest.error())
    link.loss = 0.001
    guest.load.run(50)
    guest.end()


def test_two_links_at_once(tmp_path: Path) -> None:
    """Each link has addresses of its own, so two suites on one host do not disturb each other."""
    with ExitStack() as stack:
        links = []
        for name in ("one", "two"):
            command = ["sh", "-c", f"echo ADDRESS >{tmp_path / name}; sleep 60"]
            links.append(stack.enter_context(LossyLink(command, 1.0, 1)))
        assert links[0].far != links[1].far
        for name, link in zip(("one", "two"), links, strict=True):
            file = tmp_path / name
            until(lambda file=file, far=link.far: file.exists() and f"{far}\n" == file.read_text())


def _listens(address: str) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, 10809)) == 0
