"""What may be opened for the workers of one vbd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.supervisor.helpers import PATH
from xenbackend import journal
from xenbackend.protocol import messages
from xenbackend.protocol.jobs import HeldFile, KeptConnection
from xenbackend.protocol.opening import Connected, Opened, Undrained
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.vbd.notes import Exchange
from xenbackend.supervisor.vbd.openings import Openings

OPEN = messages.Open(1, "vbd/5/51712", "xenbackend.rig.host:/rig", 5, "aio:/img", read_only=True, may_wait=True)


def openings(directory: Path, taken: list[Any] | None = None, spec: Any = None) -> Openings:
    """Return the openings of a disk that is served from /img, with one kept file and one kept connection."""

    def take(*arguments: Any, **named: Any) -> str:
        (taken if taken is not None else []).append((arguments, named))
        return "no"

    kept = [(SimpleNamespace(name="/img", identity="file device=1 inode=2"), 7)]
    files = SimpleNamespace(kept=lambda: kept, take=take)
    connection = KeptConnection("unix:/s", 0)
    connections = SimpleNamespace(kept=lambda: [(connection, 8)], take=take, is_undrained=take)
    notes = SimpleNamespace(chain="aio:/img", exchange=None, in_service=[HeldFile("/base", 1, 3)])
    page = memoryview(bytearray(journal.RINGS_AT))
    handover: Any = SimpleNamespace(
        files=files, connections=connections, notes=notes, page=page, chain_in_service=lambda: "aio:/img"
    )
    context: Any = SimpleNamespace(
        settings=Settings(socket=str(directory / "control.sock"), parents=["/srv"], scratch="/scratch")
    )
    device: Any = SimpleNamespace(sight=SimpleNamespace(spec=spec))
    return Openings(PATH, context, device, handover)


def test_each_order_has_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """A job has what its order needs: devices and the export for `Open`, both chains for an exchange, one new file for
    a snapshot. No job is made for an order that opens nothing.
    """
    it = openings(tmp_path)
    opened = it.for_order(OPEN)
    waited, again = it.for_order(messages.Serve(2, None)), it.for_order(messages.Serve(3, None))
    swap = it.for_question(messages.Swap("aio:/other"))
    branch = it.for_question(messages.Branch("/leaf", ""))

    assert opened is not None
    assert waited is not None
    assert swap is not None
    assert branch is not None
    assert (["aio:/img"], True, OPEN.host, 5) == (opened.chains, opened.read_only, opened.host, opened.frontend_domid)
    assert (["aio:/img"], "", "") == (waited.chains, waited.host, waited.makes)
    assert again is None, "the image is open"
    assert (["aio:/img", "aio:/other"], True, "") == (swap.chains, swap.read_only, swap.makes)
    assert (["aio:/img"], "/leaf") == (branch.chains, branch.makes)
    assert it.for_question(messages.Pause()) is None
    assert it.for_question(messages.Branch("@then", "")) is None, "no file is made"
    assert [7, 8] == it.kept()
    assert ["/img"] == [each.name for each in swap.kept]
    for job in (opened, waited, swap, branch):
        assert (["/srv"], [HeldFile("/base", 1, 3)]) == (job.parents, job.in_service)


def test_a_guest_that_comes_has_not_written_here_before_it_is_served(tmp_path: Path) -> None:
    """If a worker has opened the chain of a guest that migrates here, its successor resumes nothing unless that worker
    has served: the guest may still write elsewhere.
    """
    it = openings(tmp_path)
    assert it.resumes(has_opened=True), "as far as a new service knows"
    it.for_order(OPEN)
    it.for_order(replace(OPEN, may_wait=False))
    assert not it.resumes(has_opened=True)
    journal.AGREED.write(it._handover.page, {})
    assert (True, False) == (it.resumes(has_opened=True), it.resumes(has_opened=False))


def test_an_inherited_worker_may_open_what_the_toolstack_says(tmp_path: Path) -> None:
    """What an inherited worker may write follows from the node; if that says nothing, it may write nothing."""
    spec = SimpleNamespace(read_only=False, shareable=False)
    written, read = (openings(tmp_path, spec=each).for_question(messages.Swap("aio:/x")) for each in (spec, None))
    waiting = openings(tmp_path, spec=spec).for_order(messages.Serve(2, None))

    assert written is not None
    assert read is not None
    assert (False, True) == (written.read_only, read.read_only)
    assert waiting is not None, "it may have looked at the image only"


def test_what_is_opened_is_kept_as_of_its_chain(tmp_path: Path) -> None:
    """A file is kept for the chain that it was opened for. Another file may replace one only if the order says so whose
    opener has found it, whatever was asked since then.
    """
    taken: list[Any] = []
    it = openings(tmp_path, taken)
    first, later = messages.Swap("aio:/x", replaces=True), messages.Swap("aio:/x", is_resize=True)
    for each in (first, later):
        it.for_question(each)

    for question in (first, later, None):
        assert "no" == it.found(question, Opened("/x", "file device=1 inode=3", 1), [9])
    named = [(True, False), (False, True), (False, False)]
    assert named == [(each["replaces"], each["may_grow"]) for _, each in taken]
    assert [(("/x", "file device=1 inode=3", 9), True)] * 3 == [(each, more["is_next"]) for each, more in taken]


def test_what_becomes_of_an_unnamed_file_the_notes_say(tmp_path: Path) -> None:
    """Each job has the directory for unnamed files. Only the job of the exchange that was ordered names the file, or
    replaces it: no worker can ask for either.
    """
    it = openings(tmp_path)
    plain = it.for_question(messages.Swap("cow:|aio:/x"))
    it._handover.notes.exchange = Exchange(1, "", "cow:/kept|aio:/x", names_unnamed="/kept")
    named = it.for_question(messages.Swap("cow:/kept|aio:/x"))
    it._handover.notes.exchange = Exchange(1, "", "cow:|aio:/x", renews_unnamed=True)
    renewed = it.for_question(messages.Swap("cow:|aio:/x"))
    found = [(each.scratch, each.names_unnamed, each.renews_unnamed) for each in (plain, named, renewed) if each]

    assert [("/scratch", "", False), ("/scratch", "/kept", False), ("/scratch", "", True)] == found


def test_a_connection_is_kept_and_what_has_no_end_is_noted(tmp_path: Path) -> None:
    """A reconnection is made for the chain in service, with what is kept, and its opener does nothing else. What the
    opener reports is kept or noted.
    """
    taken: list[Any] = []
    it = openings(tmp_path, taken)
    job = it.for_question(messages.Reconnect())

    assert job is not None
    assert (["aio:/img"], [KeptConnection("unix:/s", 0)], True) == (job.chains, job.connections, job.only_connects)
    assert [7, 8] == it.kept()
    assert "no" == it.found(None, Connected("unix:/s", 1, is_alone=True), [9])
    assert "" == it.found(None, Undrained("unix:/s", 2, is_broken=False), [])
    assert [(("unix:/s", 1, 9), {"is_alone": True}), (("unix:/s", 2), {"is_broken": False})] == taken


@pytest.mark.parametrize(
    ("chain", "may"),
    [
        ("log:|nbd:nbd://host/a", True), ("nbd:nbd+unix:///?socket=/s", True), ("aio:/img", False),
        ("luks:key=/k|aio:/img", False), ("rbd:a/b,id=x", False), ("", False), ("nonsense:", False),
    ],
)  # fmt: skip
def test_who_has_no_server_has_lost_no_connection(tmp_path: Path, chain: str, *, may: bool) -> None:
    """Only the worker of a chain that names a server can want another connection, whatever else it says."""
    it = openings(tmp_path)
    it._handover.chain_in_service = lambda: chain  # type: ignore[method-assign]  # of a stand-in
    assert may == it.may_reconnect()


def test_a_device_model_is_served_where_that_was_ordered_or_not_at_all(tmp_path: Path) -> None:
    """A worker may say that it serves a device model at the path that it was told, until it has said that this is over;
    at any other path none is. The next worker may do so only if it is told so.
    """
    it = openings(tmp_path)
    it.for_order(replace(OPEN, export=it.export))
    assert [it.export, "", None, None] == [
        it.believed_export(each) for each in (it.export, "", "/run/xenbackend/nbd/other.sock", f"{it.export},x=y")
    ]
    it.saw_export(it.export)
    assert it.export == it.believed_export(it.export)
    it.saw_export("")
    assert ["", None] == [it.believed_export(each) for each in ("", it.export)]
    it.for_order(replace(OPEN, export=it.export))
    assert it.export == it.believed_export(it.export)
    it.remove_export()
    it.for_order(OPEN)
    assert ["", None] == [it.believed_export(each) for each in ("", it.export)]


def test_what_an_earlier_service_has_named_is_shown_if_it_is_ours(tmp_path: Path) -> None:
    """A worker of an earlier service may serve a device model where that one has told it to. Nobody is led to a path
    other than our own, and the worker is not to blame for it: the settings may have changed.
    """
    it = openings(tmp_path)
    assert [it.export, "", ""] == [it.believed_export(each) for each in (it.export, "", "/former/nbd/vbd-0-5.sock")]


def test_the_socket_of_an_export_is_removed_once_it_is_over(tmp_path: Path) -> None:
    """The export's socket is removed when the export is over, but not before it was there: the worker may be about to
    open it.
    """
    it = openings(tmp_path)
    path = Path(it.export)
    path.parent.mkdir()
    path.touch()
    it.saw_export("")
    assert path.exists()
    it.saw_export(str(path))
    it.saw_export("")
    assert not path.exists()
    it.remove_export()
