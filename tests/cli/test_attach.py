"""The commands attach and detach: arguments to calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.answering import Request, answering
from xenbackend.cli.attach import join_place
from xenbackend.cli.main import main
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore import toolstack
from xenbackend.supervisor.xenstore.store import Store


def test_a_file_is_named_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative file name would mean another file to the service: it is refused, and xenstore is not changed."""
    with Xenstored(tmp_path / "store") as xenstored:
        xenstored.add_domain_socket(5)
        nodes = xenstored.dump()
        status = main(["attach", "5", "xvdb", "log:x.rec|null:1G", "--store", xenstored.address])
        untouched = xenstored.dump() == nodes

    assert (2, True) == (status, untouched)
    assert (
        f"option record: x.rec is relative to the service's working directory; write the whole path, such as "
        f"{Path.cwd()}/x.rec" in (capsys.readouterr().err)
    )


@pytest.mark.parametrize("timeout", ["nan", "-1", "soon"])
def test_a_timeout_is_a_duration(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A timeout that is not a duration is refused with a sentence before anything is done."""
    with pytest.raises(SystemExit) as exit_:
        main(["detach", "5", "xvdb", "--timeout", timeout])

    assert 2 == exit_.value.code
    assert f"{timeout!r} is not a duration" in capsys.readouterr().err


def test_mistakes_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad chain, an unknown domain or an unknown disk ends with status 2; an unreachable xenstore with 1."""
    with Xenstored(tmp_path / "store") as xenstored:
        store = ["--store", xenstored.address]
        statuses = [
            main(["attach", "5/xvdb", "nosuch:x", *store]),
            main(["attach", "5/xvdb", "null:1G", *store]),
            main(["attach", "mail/xvdb", "null:1G", *store]),
            main(["detach", "5/xvdb", *store]),
            main(["detach", "5/xvdb", "--store", str(tmp_path / "none")]),
        ]
    lines = capsys.readouterr().err.splitlines()

    assert [2, 2, 2, 2, 1] == statuses
    assert "nosuch" in lines[0]
    assert "xenbackend: there is no domain 5; xl list shows them" in lines
    assert "xenbackend: there is no guest 'mail'; see: xl list" in lines
    assert "xenbackend: xenbackend serves no disk 5/xvdb; see: xenbackend status" in lines
    assert "cannot connect" in lines[-1]


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("5/xvda null:1G", "5/xvda null:1G"), ("5 xvda null:1G", "5/xvda null:1G"), ("5 51712", "5/51712"),
        ("--timeout 5 5 xvda", "--timeout 5 5/xvda"), ("--timeout 5 mail/xvda", "--timeout 5 mail/xvda"),
        ("5 /dev/xvda null:1G", "5/xvda null:1G"), ("5 xvda --timeout 3 7 x", "5/xvda --timeout 3 7 x"), ("5", "5"),
        ("5 --wait xvda", "5 --wait xvda"), ("--store /x 5 xvda", "--store /x 5/xvda"), ("5 null:1G", "5 null:1G"),
    ],
)  # fmt: skip
def test_a_disk_in_two_words_is_still_understood(words: str, joined: str) -> None:
    """Domain and device may still be given as two words; no other words are joined."""
    assert joined.split() == join_place(words.split())


@pytest.fixture
def xenstored(tmp_path: Path) -> Iterator[Xenstored]:
    """A xenstore with a guest 5, which is called mail."""
    with Xenstored(tmp_path / "store") as daemon:
        daemon.add_domain_socket(5)
        with Store(daemon.address) as store:
            store.write("/local/domain/5/name", "mail")
        yield daemon


def paths(xenstored: Xenstored) -> set[str]:
    """Return the paths of all nodes."""
    return {path for path, *_ in xenstored.dump()}


FRONTEND, BACKEND = "/local/domain/5/device/vbd/51728", "/local/domain/0/backend/vbd/5/51728"


@pytest.mark.parametrize("name", [["5/xvdb"], ["5", "xvdb"], ["mail/xvdb"]])
def test_a_disk_is_attached(
    tmp_path: Path, xenstored: Xenstored, capsys: pytest.CaptureFixture[str], name: list[str]
) -> None:
    """However a disk is named, the answer uses the same name for it."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK)) as control:
        where = ["--store", xenstored.address]
        assert 0 == main(["attach", *name, "null:1G", *where, "--socket", control.path])
        attached = paths(xenstored)
        assert 0 == main(["detach", *name, "--force", "--timeout", "0", *where])

    assert "attached 5/xvdb\ndetached 5/xvdb\n" == capsys.readouterr().out
    hotplug = {"verb": "hotplug", "action": "add", "path": BACKEND, "chain": "null:1G"}
    assert [{"verb": "ping"}, hotplug] == control.asked
    assert {FRONTEND, BACKEND} <= attached
    assert not {FRONTEND, BACKEND} & paths(xenstored)


@pytest.mark.parametrize("name", ["5/xvdb", "vbd3/5/xvdb"])
def test_a_disk_is_detached_whatever_its_kind(tmp_path: Path, xenstored: Xenstored, name: str) -> None:
    """A disk of kind vbd3, as xl attaches from Xen 4.19 on, is detached by either name: libxl's entry has the kind."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK)) as control:
        where = ["--store", xenstored.address]
        assert 0 == main(["attach", "vbd3/5/xvdb", "null:1G", *where, "--socket", control.path])
        attached = paths(xenstored)
        assert 0 == main(["detach", name, "--force", "--timeout", "0", *where])

    backend = BACKEND.replace("/vbd/", "/vbd3/")
    assert {FRONTEND, backend} <= attached
    assert not {FRONTEND, backend} & paths(xenstored)


@pytest.mark.parametrize(
    ("answer", "status", "is_there"),
    [
        (Answer(Code.UNDER_WAY, order=17), 75, True),
        (Answer(Code.FAILED, sentence="no lock"), 1, False),
        (b"", 75, True),
    ],
)
def test_an_attach_that_is_not_done_yet_goes_on(
    tmp_path: Path,
    xenstored: Xenstored,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer | bytes,
    status: int,
    is_there: bool,
) -> None:
    """If the time runs out, the attach goes on in the service; an attach that failed is undone completely."""
    monkeypatch.setattr(toolstack, "_wait_for", lambda *_: None)  # no service runs
    reply = {"ping": Answer(Code.OK), "hotplug": answer}
    with answering(tmp_path / "x", lambda request: reply[request["verb"]]) as control:
        where = ["--store", xenstored.address, "--socket", control.path]
        assert status == main(["attach", "5/xvdb", "null:1G", "--timeout", "2", *where])

    assert 2.0 == control.asked[-1]["wait"]
    assert is_there == ({FRONTEND, BACKEND} <= paths(xenstored))


@pytest.mark.parametrize(
    ("answers", "status", "is_there"),
    [
        ([b"", Answer(Code.OK)], 0, True),
        ([b"", Answer(Code.FAILED, sentence="no lock")], 1, False),
        ([b"", b""], 75, True),
        ([b""], 75, True),
        ([Answer(Code.UNDER_WAY, order=17)], 75, True),
    ],
)
def test_the_next_service_is_asked_once(
    tmp_path: Path,
    xenstored: Xenstored,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Answer | bytes],
    status: int,
    is_there: bool,
) -> None:
    """If a service ends before it answers, the next one is asked for the same order, by its token. Without an answer,
    or without a next service, the attach may be under way.
    """
    monkeypatch.setattr(toolstack, "_wait_for", lambda *_: None)  # no service runs
    left, tokens = list(answers), set()

    def answer(request: Request) -> Answer | bytes:
        if request["verb"] == "ping":
            return Answer(Code.OK)
        tokens.add(request["token"])
        found = left.pop(0)
        if not left:
            Path(control.path).unlink()  # so that there is no other service
        return found

    with answering(tmp_path / "x", answer) as control:
        where = ["--store", xenstored.address, "--socket", control.path]
        assert status == main(["attach", "5/xvdb", "null:1G", *where])

    assert ([], 1) == (left, len(tokens))
    assert is_there == ({FRONTEND, BACKEND} <= paths(xenstored))


def test_a_detach_that_waits_for_the_guest_is_under_way(
    tmp_path: Path, xenstored: Xenstored, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detach that the guest has not completed in time is reported as still under way."""
    with answering(tmp_path / "x", lambda _: Answer(Code.OK)) as control:
        main(["attach", "5/xvdb", "null:1G", "--store", xenstored.address, "--socket", control.path])
        assert 75 == main(["detach", "5/xvdb", "--timeout", "0.01", "--store", xenstored.address])

    assert "5/xvdb: detach is still under way, the backend's state is Closing after 0.01 s" in capsys.readouterr().err
