"""How the hotplug script reads the service's answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.answering import answering
from xenbackend.host import block_xenbackend
from xenbackend.host.block_xenbackend import NoService, Refused, ask
from xenbackend.protocol.answers import Answer
from xenbackend.protocol.codes import Code

BACKEND = "/local/domain/0/backend/vbd/5/51712"


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer | bytes) -> list[dict[str, object]]:
    """Run the script's request against a service with this answer, and return the requests."""
    monkeypatch.setattr(block_xenbackend, "SETTINGS", str(tmp_path / "none"))
    with answering(tmp_path / "x", lambda _: answer) as control:
        monkeypatch.setattr(block_xenbackend, "SOCKET", control.path)
        ask(BACKEND)
        return control.asked


@pytest.mark.parametrize(
    "answer",
    [Answer(Code.OK), Answer(Code.OK, "connected"), Answer(Code.OK, order=17), b'{"data": "connected"}\n'],
)
def test_a_disk_that_is_open_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer | bytes) -> None:
    """Answers of this service, and of one older than the script, count as success."""
    assert [{"verb": "hotplug", "action": "add", "path": BACKEND}] == asked(tmp_path, monkeypatch, answer)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
@pytest.mark.parametrize("sentence", ["null: it is broken", '{"code": "ok"}'])
def test_a_no_is_one_whatever_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Code, sentence: str
) -> None:
    """Every other code is a refusal with the service's own sentence, even if that looks like success."""
    with pytest.raises(Refused) as caught:
        asked(tmp_path, monkeypatch, Answer(code, {"said": sentence}, sentence))

    assert sentence == str(caught.value)


def test_a_service_that_ends_is_asked_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the service ends before it answers, the request is repeated once; if that fails too, the error says so."""
    with pytest.raises(NoService, match="ended before it answered"):
        asked(tmp_path, monkeypatch, b"")
