"""When a service stops while xenstore is away, it stays known which chain has the guest's data."""

from __future__ import annotations

import io
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from tests.supervisor.helpers import PATH, Kept, Stepped, write_like_libxl
from tests.supervisor.vbd.test_orders import ask, begin, is_served, serve
from xenbackend.errors import ConfigError
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd import ending, phase
from xenbackend.supervisor.vbd.last_chains import DIRECTORY, LastChain, LastChains
from xenbackend.supervisor.vbd.vbd_log import UNFINISHED
from xenbackend.supervisor.xenstore.store import Store

pytestmark = pytest.mark.slow  # every one starts processes


def served(xenstored: Xenstored, toolstack: Store, guest: Store, directory: Path, kept: Kept | None = None) -> Stepped:
    """Return a registry that serves a guest by a chain that xenstore does not know of, because it went away before."""
    keeper = kept.keeper() if kept else None
    stepped = serve(Stepped(xenstored.address, Settings(), directory=directory, keeper=keeper), toolstack, guest)
    xenstored.stop()
    answer = ask(stepped, "set", chain="null:7G")
    assert (Code.OK, "null:7G") == (answer.code, answer.data["chain"])
    return stepped


def stop(stepped: Stepped) -> None:
    """Stop the registry, and let every worker close its disk."""
    stepped.registry.stop()
    stepped.until(lambda: not stepped.registry.vbds)
    stepped.close()


def files(directory: Path) -> list[str]:
    """Return the files that were left for the next service."""
    return sorted(each.name for each in (directory / DIRECTORY).glob("*"))


def test_a_service_that_stops_waits_for_xenstore(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, lines: io.StringIO
) -> None:
    """A service that stops closes the disk, and ends once xenstore is back and `params` has the chain in service."""
    stepped = served(xenstored, toolstack, guest, tmp_path)
    stepped.registry.stop()
    waits = [stepped.vbd().ending.waits_for]
    stepped.until(lambda: stepped.vbd().worker is None)
    stepped.turn(0.1)
    is_there = PATH in stepped.registry.vbds
    waits.append(stepped.vbd().ending.waits_for)
    xenstored.start()
    stepped.until(lambda: not stepped.registry.vbds)
    stepped.close()

    assert is_there
    assert [
        "its worker, which finishes the requests in flight and closes the disk",
        "xenstore, which must be told that null:7G is in service",
    ] == waits
    with Store(xenstored.address) as store:
        assert ("null:7G", "4") == (store.read(f"{PATH.backend}/params"), store.read(f"{PATH.backend}/state"))
    assert [] == files(tmp_path)
    [line] = [each for each in lines.getvalue().splitlines() if "waits for that before it ends" in each]
    assert line.endswith("chain=null:7G seconds=45")


@pytest.mark.parametrize("leaves", [False, True], ids=["stop", "stop of systemd"])
def test_the_next_service_serves_the_chain_that_was_in_service(
    xenstored: Xenstored,
    toolstack: Store,
    guest: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    leaves: bool,
) -> None:
    """If the service ends before xenstore is back, it leaves a file, by which the next one serves that chain. Once
    `params` has it, the file is removed.

    This holds even if nothing that was kept reaches the next service: systemd closes all of it when a unit is stopped.
    """
    monkeypatch.setattr(ending, "WAIT_S", 0.5)
    stepped = served(xenstored, toolstack, guest, tmp_path)
    if leaves:
        stepped.leave()
    else:
        stop(stepped)
    left = files(tmp_path)
    xenstored.start()
    with Store(xenstored.address) as store:
        params = store.read(f"{PATH.backend}/params")
        with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as following:
            following.until(is_served(following))
            chain = following.vbd().device.layers[0].text
            following.until(lambda: store.read(f"{PATH.backend}/params") == "null:7G")
            following.until(lambda: not files(tmp_path))

        assert (["vbd-0-5-51712.json"], "null:1G", "null:7G") == (left, params, chain)


def test_a_service_ends_whatever_is_unfinished(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while it closes the disk cannot be replaced without xenstore: the service still ends in time,
    and leaves its file.
    """
    monkeypatch.setattr(ending, "WAIT_S", 1.0)
    stepped = served(xenstored, toolstack, guest, tmp_path)
    worker = stepped.vbd().worker
    worker.kill("the test wants it")
    stop(stepped)

    assert ["vbd-0-5-51712.json"] == files(tmp_path)


def test_a_node_that_was_made_anew_is_another_vbd_s(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was left for a vbd does not apply to the vbd that a toolstack makes in its place while no service
    runs.
    """
    monkeypatch.setattr(ending, "WAIT_S", 0.5)
    stop(served(xenstored, toolstack, guest, tmp_path))
    xenstored.start()
    with Store(xenstored.address) as store:
        store.remove(PATH.backend)
        write_like_libxl(store, params="null:1G")
        with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as following:
            following.until(lambda: store.read_optional(f"{PATH.backend}/hotplug-status") == "connected")

            assert "null:1G" == store.read(f"{PATH.backend}/params") == following.vbd().device.layers[0].text
            assert [] == files(tmp_path)


def test_what_was_left_of_a_vbd_that_is_gone_goes(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a guest that ended while no service ran is removed, so that it does not apply to a later guest with
    its number.
    """
    monkeypatch.setattr(ending, "WAIT_S", 0.5)
    stop(served(xenstored, toolstack, guest, tmp_path))
    xenstored.start()
    with Store(xenstored.address) as store:
        store.remove(PATH.backend)
    with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as following:
        following.until(lambda: not files(tmp_path) and not following.registry.vbds)


def test_what_was_kept_counts_more_than_a_file(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, kept: Kept
) -> None:
    """A service that is replaced does not wait. The next one goes on with its worker, and removes the file."""
    stepped = served(xenstored, toolstack, guest, tmp_path, kept)
    worker = stepped.vbd().worker
    stepped.leave()
    left = files(tmp_path)
    xenstored.start()
    with (
        Store(xenstored.address) as store,
        closing(Stepped(xenstored.address, Settings(), directory=tmp_path, keeper=kept.keeper())) as following,
    ):
        following.until(lambda: store.read(f"{PATH.backend}/params") == "null:7G")
        following.until(lambda: not files(tmp_path))

        assert (["vbd-0-5-51712.json"], worker.pid) == (left, following.vbd().worker.pid)


def test_a_chain_that_nobody_could_be_told_of_is_told_in_the_log(
    xenstored: Xenstored,
    toolstack: Store,
    guest: Store,
    tmp_path: Path,
    lines: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the file cannot be written, the chain that has the guest's data is logged as critical."""
    monkeypatch.setattr(ending, "WAIT_S", 0.5)
    (tmp_path / DIRECTORY).write_text("not a directory")
    stop(served(xenstored, toolstack, guest, tmp_path))

    [line] = [each for each in lines.getvalue().splitlines() if each.startswith("<2>")]
    assert "chain=null:7G" in line
    assert DIRECTORY in line


def undecided(xenstored: Xenstored, toolstack: Store, guest: Store, directory: Path) -> None:
    """End a service while a worker exchanges the chain, and keep nothing for the next one."""
    stepped = Stepped(xenstored.address, Settings(), directory=directory)
    serve(stepped, toolstack, guest, "null:4G")
    begin(stepped, "set", chain="null:7G")
    stepped.leave()


def test_a_file_is_there_before_a_chain_is_exchanged_and_goes_when_xenstore_knows(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path
) -> None:
    """The file is written before an exchange and removed once `params` is right, so that the next service knows of an
    exchange that a worker may finish alone.
    """
    with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as stepped:
        serve(stepped, toolstack, guest)
        before = files(tmp_path)
        begin(stepped, "set", chain="null:7G")
        meanwhile = LastChains(tmp_path).of(PATH)
        stepped.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:7G")
        stepped.until(lambda: not files(tmp_path))

    assert ([], LastChain("null:1G", [], "null:7G")) == (before, meanwhile)


def test_an_exchange_that_is_refused_leaves_no_file(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path
) -> None:
    """An exchange that was refused leaves no file."""
    with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as stepped:
        serve(stepped, toolstack, guest)
        answer = ask(stepped, "set", chain="null:5G")

        assert (Code.INVALID, []) == (answer.code, files(tmp_path))


def test_a_disk_whose_exchange_nobody_has_seen_the_end_of_waits_for_an_administrator(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path
) -> None:
    """If nobody has seen how an exchange ended, neither chain is served, as the guest's last writes may be in the other
    one. `resume` is refused; `set` with --replace decides. Later services remember that the disk waits.
    """
    undecided(xenstored, toolstack, guest, tmp_path)
    for _ in range(2):
        stepped = Stepped(xenstored.address, Settings(), directory=tmp_path)
        vbd = stepped.vbd()
        stepped.until(lambda: vbd.device.sight.has_looked)  # noqa: B023 - at once
        found = (vbd.device.reason, vbd.worker, vbd.device.phase.value)
        with pytest.raises(ConfigError, match="null:7G was replacing null:4G"):
            begin(stepped, "resume")
        with pytest.raises(ConfigError, match="--replace"):
            begin(stepped, "set", chain="null:7G")
        left = files(tmp_path)
        stepped.leave()

        assert ("undecided", None, "none", ["vbd-0-5-51712.json"]) == (*found, left)
    with closing(Stepped(xenstored.address, Settings(), directory=tmp_path)) as stepped:
        stepped.until(lambda: stepped.vbd().device.sight.has_looked)
        answer = ask(stepped, "set", chain="null:7G", replace=True)
        stepped.until(is_served(stepped))
        stepped.until(lambda: toolstack.read(f"{PATH.backend}/params") == "null:7G")
        stepped.until(lambda: not files(tmp_path))

        assert (Code.OK, "null:7G", "") == (answer.code, answer.data["chain"], stepped.vbd().device.error)


def test_a_service_that_was_only_replaced_finds_out_by_itself(
    xenstored: Xenstored,
    toolstack: Store,
    guest: Store,
    tmp_path: Path,
    kept: Kept,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the notes were kept, the next service finds out how the exchange ended from the worker or its journal, and
    removes the file.
    """
    monkeypatch.setitem(phase.LIMIT_S, phase.Phase.ADOPTING, 0.5)  # the worker is dead, which its heir is not told
    stepped = Stepped(xenstored.address, Settings(), directory=tmp_path, keeper=kept.keeper())
    serve(stepped, toolstack, guest, "null:4G")
    begin(stepped, "set", chain="null:7G")
    worker = stepped.vbd().worker
    assert worker is not None
    stepped.leave()
    os.kill(worker.pid, signal.SIGKILL)
    left = files(tmp_path)
    with closing(Stepped(xenstored.address, Settings(), directory=tmp_path, keeper=kept.keeper())) as following:
        following.until(is_served(following))

        assert ("null:4G", "") == (following.vbd().chain_in_service(), following.vbd().device.error)
        assert (["vbd-0-5-51712.json"], []) == (left, files(tmp_path))


@pytest.mark.parametrize("is_there", [True, False])
def test_only_a_guest_that_is_there_has_lost_something(
    xenstored: Xenstored, toolstack: Store, guest: Store, tmp_path: Path, lines: io.StringIO, *, is_there: bool
) -> None:
    """Requests that a worker had taken and nobody has finished are logged, unless the guest has gone since the last
    look.
    """
    stepped = serve(Stepped(xenstored.address, Settings(), directory=tmp_path), toolstack, guest)
    if not is_there:
        toolstack.remove(PATH.frontend)
    stepped.vbd().ending.end()
    said = lines.getvalue()
    stop(stepped)

    assert is_there == (UNFINISHED in said)
