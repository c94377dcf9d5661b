"""The hotplug script as libxl starts it: its own process, a real service's socket, and the real xenstore-write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervisor.helpers import PATH, Stepped, write_like_libxl
from xenbackend.host import block_xenbackend
from xenbackend.host.example import example
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.rig.store import Xenstored
from xenbackend.settings_file import PATH as SETTINGS
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes
SCRIPT = Path(block_xenbackend.__file__)


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A simulated xenstored."""
    with Xenstored(tmp_path / "xenstored") as daemon:
        yield daemon


@pytest.fixture
def toolstack(xenstored: Xenstored) -> Iterator[Store]:
    """A toolstack's connection, with a guest 5 that exists."""
    xenstored.add_domain_socket(5)
    with Store(xenstored.address) as store:
        yield store


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script, with settings that name a socket in the test's directory."""
    (tmp_path / "settings.toml").write_text(f'socket = "{tmp_path}/control.sock"\n')
    copy = tmp_path / "block-xenbackend"
    text = SCRIPT.read_text().replace(f'SETTINGS = "{SETTINGS}"', f'SETTINGS = "{tmp_path}/settings.toml"')
    copy.write_text(text.replace("#!/usr/bin/python3 -IS", f"#!{sys.executable} -IS"))
    copy.chmod(0o755)
    return copy


@pytest.fixture
def scripts() -> list[str]:
    """The script names that count as ours."""
    return Settings().scripts


@pytest.fixture
def service(xenstored: Xenstored, tmp_path: Path, scripts: list[str]) -> Iterator[None]:
    """A registry that listens at the socket of the settings, in its own thread."""
    settings = Settings(scripts=scripts)
    stepped = Stepped(xenstored.address, settings, socket=f"{tmp_path}/control.sock", runs_script=False)
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            stepped.turn(0.01)

    thread = threading.Thread(target=loop)
    thread.start()
    yield
    is_over.set()
    thread.join()
    stepped.close()


def _run(script: Path, xenstored: Xenstored, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"], "XENSTORED_PATH": xenstored.address,
        "XENBUS_PATH": f"backend/{PATH}", "XENBUS_TYPE": "vbd", "XENBUS_BASE_PATH": "backend",
    }  # fmt: skip
    return subprocess.run(
        [str(script), *arguments], env=environment | more, check=False, capture_output=True, text=True, timeout=60
    )


def test_it_knows_where_the_service_listens() -> None:
    """The script cannot import our package, so it repeats two paths: they are the same."""
    assert (str(SETTINGS), DEFAULT_SOCKET) == (block_xenbackend.SETTINGS, block_xenbackend.SOCKET)


@pytest.mark.usefixtures("service")
def test_a_disk_that_opens(script: Path, xenstored: Xenstored, toolstack: Store) -> None:
    """`add` ends with 0 once the chain is open and the frontend's keys are there; `remove` has nothing to do."""
    write_like_libxl(toolstack)
    ended = _run(script, xenstored, "add")

    assert (0, "", "") == (ended.returncode, ended.stdout, ended.stderr)
    assert ("connected", "2097152") == tuple(
        toolstack.read(f"{PATH.backend}/{key}") for key in ("hotplug-status", "sectors")
    )
    assert 0 == _run(script, xenstored, "remove").returncode


@pytest.mark.usefixtures("service")
def test_it_costs_little_more_than_an_interpreter(
    script: Path, xenstored: Xenstored, toolstack: Store, tmp_path: Path
) -> None:
    """With the installed settings, attaching a disk imports none of the modules that would double the script's cost."""
    write_like_libxl(toolstack)
    (tmp_path / "settings.toml").write_text(example())
    text = script.read_text().replace(DEFAULT_SOCKET, f"{tmp_path}/control.sock")
    script.write_text(text.replace(" -IS\n", " -ISXimporttime\n"))
    ended = _run(script, xenstored, "add")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}

    assert (0, {"os", "_socket"}) == (ended.returncode, imported & {"os", "_socket", "enum", "glob", "json", "socket"})


@pytest.mark.parametrize("line", ['socket = "{}"', "  socket='{}'", '"socket" = "{}" # moved'])
@pytest.mark.usefixtures("service")
def test_a_socket_that_was_moved(
    script: Path, xenstored: Xenstored, toolstack: Store, tmp_path: Path, line: str
) -> None:
    """The script finds the socket that the settings name, however they write it."""
    write_like_libxl(toolstack)
    (tmp_path / "settings.toml").write_text(line.format(tmp_path / "control.sock") + "\n" + example())

    assert 0 == _run(script, xenstored, "add").returncode


@pytest.mark.usefixtures("service")
def test_a_chain_that_does_not_open(script: Path, xenstored: Xenstored, toolstack: Store) -> None:
    """The service's sentence is on stderr and in the node that libxl reads."""
    write_like_libxl(toolstack, params="null:2G")
    ended = _run(script, xenstored, "add")

    assert (1, "block-xenbackend: null: it is broken\n") == (ended.returncode, ended.stderr)
    assert "null: it is broken" == toolstack.read(f"{PATH.backend}/hotplug-error")


@pytest.mark.usefixtures("service")
def test_a_disk_of_somebody_else(script: Path, xenstored: Xenstored, toolstack: Store) -> None:
    """A disk with another script is refused, and nothing is written to its directory."""
    write_like_libxl(toolstack, script="/etc/xen/scripts/block")
    before = toolstack.dictionary(PATH.backend)
    ended = _run(script, xenstored, "add")

    assert (1, before) == (ended.returncode, toolstack.dictionary(PATH.backend))
    assert (
        "vbd/5/51712 is not served: it is gone, or its key script does not name one of block-xenbackend, tap2"
        in ended.stderr
    )


@pytest.mark.parametrize("scripts", [["block-xenbackend", "block-tap"]])
@pytest.mark.usefixtures("service")
def test_a_disk_whose_script_has_xens_own_name(script: Path, xenstored: Xenstored, toolstack: Store) -> None:
    """A link with the name that libxl uses for libvirt is our script, if the settings list that name."""
    path = VbdPath("vbd3", 0, 5, 51712)
    write_like_libxl(toolstack, path, script="/etc/xen/scripts/block-tap", params="aio:null:1G")
    link = script.with_name("block-tap")
    link.symlink_to(script.name)
    ended = _run(link, xenstored, "add", XENBUS_PATH=f"backend/{path}", XENBUS_TYPE="vbd3")

    assert (0, "") == (ended.returncode, ended.stderr)
    assert ("connected", "2097152") == tuple(
        toolstack.read(f"{path.backend}/{key}") for key in ("hotplug-status", "sectors")
    )


@pytest.mark.skipif(shutil.which("xenstore-write") is None, reason="xenstore-utils is not installed")
def test_no_service(script: Path, xenstored: Xenstored, toolstack: Store) -> None:
    """Without a service `add` fails at once, and writes its sentence with xenstore's own tool."""
    write_like_libxl(toolstack)
    ended = _run(script, xenstored, "add")

    sentence = "the xenbackend service does not run; start it with: systemctl start xenbackend"
    assert (1, f"block-xenbackend: {sentence}\n") == (ended.returncode, ended.stderr)
    assert (sentence, "error") == tuple(
        toolstack.read(f"{PATH.backend}/{key}") for key in ("hotplug-error", "hotplug-status")
    )


@pytest.mark.usefixtures("service")
def test_a_service_that_goes_by_former_settings(
    script: Path, xenstored: Xenstored, toolstack: Store, tmp_path: Path
) -> None:
    """If nobody listens at the settings' socket the script tries the default: the service may have other settings."""
    write_like_libxl(toolstack)
    (tmp_path / "settings.toml").write_text('socket = "/nowhere/control.sock"\n')
    script.write_text(script.read_text().replace(DEFAULT_SOCKET, f"{tmp_path}/control.sock"))

    assert 0 == _run(script, xenstored, "add").returncode


def test_a_path_that_is_none(script: Path, xenstored: Xenstored) -> None:
    """A path that would have to be escaped is refused before the service is asked."""
    ended = _run(script, xenstored, "add", XENBUS_PATH='backend/"}')

    assert (1, """block-xenbackend: XENBUS_PATH='backend/"}' is not a path in xenstore\n""") == (
        ended.returncode,
        ended.stderr,
    )


def test_by_hand(script: Path, xenstored: Xenstored) -> None:
    """If it is started by hand, it says what it is for."""
    statuses = [_run(script, xenstored).returncode, _run(script, xenstored, "add", XENBUS_PATH="").returncode]

    assert [2, 2] == statuses
    assert "for a Xen toolstack" in _run(script, xenstored, "frob").stderr
