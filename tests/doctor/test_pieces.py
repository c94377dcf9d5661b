"""The pieces of a report when nothing answers; tests/system/test_report.py has a whole host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.doctor.driver_domain import make_driver_domain
from xenbackend.doctor import pieces
from xenbackend.doctor.examine import Wanted
from xenbackend.doctor.pieces import Piece
from xenbackend.doctor.place import Place
from xenbackend.rig.store import Xenstored
from xenbackend.supervisor.xenstore.store import Store


@pytest.mark.slow
def test_each_piece_is_there_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without service, xenstore, Xen and tools the other pieces are gathered, and the end of a long log."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dmesg").write_text(
        "#!/bin/sh\necho 'xen: Command line: password=x'\necho 'xen-blkback: no'; echo other\n"
    )
    (tools / "xl").write_text("#!/bin/sh\necho told >&2; exit 3\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(pieces, "MOST", 10_000)
    monkeypatch.setattr(pieces.activate, "is_possible", lambda: False)
    log = tmp_path / "log"
    log.write_text("early\n" + "x" * 20_000 + "\nso\nlate\n")
    wanted = Wanted(str(tmp_path / "none"), str(tmp_path / "store"), tmp_path / "missing.toml")
    found = {each.name: each for each in pieces.gather(wanted, log)}

    assert "no service answers at" in found["status.json"].problem
    assert "xl info ended with 3: told" == found["xl-info.txt"].problem
    assert found["xenstore.txt"].problem
    assert "xen-blkback: no\n" == found["kernel.log"].text
    assert ("(the first 20007 bytes are left out)\nso\nlate\n", 20007) == (
        found["service.log"].text,
        found["service.log"].left_out,
    )
    assert "xenbackend " in found["version.txt"].text
    assert "there is no such file" in json.loads(found["settings.json"].text)["mistakes"][0]
    assert any(each["check"] == "service" for each in json.loads(found["doctor.json"].text))


@pytest.fixture
def gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Piece]]:
    """Return a function that gathers the pieces by name, without a service and without tools."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pieces.activate, "is_possible", lambda: False)
    monkeypatch.setattr(pieces, "examine", lambda _wanted: [])

    def gather(*, store: str = "", config: Path | None = None) -> dict[str, Piece]:
        wanted = Wanted(str(tmp_path / "none"), store, config)
        return {each.name: each for each in pieces.gather(wanted, tmp_path / "log")}

    return gather


def test_without_a_service_xenstore_is_read_all_the_same(
    tmp_path: Path, gather: Callable[..., dict[str, Piece]]
) -> None:
    """Without a service xenstore is still read, at the address of the command line or of the settings."""
    config = tmp_path / "x.toml"
    with Xenstored(tmp_path / "store") as started, Store(started.address) as nodes:
        nodes.write("/local/domain/0/backend/vbd/5/51712/params", "aio:/img")
        config.write_text(f'store = "{started.address}"\n')
        found = [gather(store=started.address), gather(config=config)]

    for each in found:
        assert "/local/domain/0/backend/vbd/5/51712/params = 'aio:/img'\n" in each["xenstore.txt"].text


def test_a_driver_domain_has_what_it_may_know(
    tmp_path: Path, gather: Callable[..., dict[str, Piece]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver domain's report has its own nodes and `xl devd`'s journal, and says that the rest is dom0's to tell."""
    monkeypatch.setattr(pieces, "here", lambda: Place(is_guest=True))
    with Xenstored(tmp_path / "store") as started:
        found = gather(store=make_driver_domain(started))

    assert "/local/domain/7/backend/vbd/5/51712/params = 'aio:/img'" in found["xenstore.txt"].text
    assert "/local/domain/5/device/vbd/51712/state = '3'" in found["xenstore.txt"].text
    assert "only dom0 can tell; run there: xl info" in found["xl-info.txt"].problem
    assert "journalctl cannot be run" in found["devd.log"].problem


def test_a_log_is_cut_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is cut between lines, with a note, as half a line could be taken for a whole one."""
    monkeypatch.setattr(pieces, "MOST", 10)
    whole, cut, one = (pieces._as_result("x", lambda text=text: text).data for text in (
        "a\nb\n", "not ok\nok\nfine\n", "x" * 30))  # fmt: skip

    assert {"text": "a\nb\n", "left_out": 0} == whole
    assert {"text": "(the first 7 bytes are left out)\nok\nfine\n", "left_out": 7} == cut
    assert "(the first 31 bytes are left out)\n" == one["text"]


def test_a_journal_of_which_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a journal has more lines than the limit, the latest are included, with a note."""
    monkeypatch.setattr(pieces, "_output", lambda *_: "line\n" * pieces._LINES)
    assert pieces._journal("x").startswith("(the latest 5000 lines; the journal may have more)\nline\n")

    monkeypatch.setattr(pieces, "_output", lambda *_: "line\n")
    assert "line\n" == pieces._journal("x")
