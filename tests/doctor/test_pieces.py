"""What a report is made of, where nothing answers; tests/system/test_report.py has a whole host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xenbackend.doctor import pieces
from xenbackend.doctor.examine import Wanted


@pytest.mark.slow
def test_each_piece_is_there_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without service, xenstore, Xen and tools the rest is gathered all the same; a long log has its end."""
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
    log.write_text("early\n" + "x" * 20_000 + "\nlate\n")
    wanted = Wanted(str(tmp_path / "none"), str(tmp_path / "store"), tmp_path / "missing.toml")
    found = {each.name: each for each in pieces.gather(wanted, log)}

    assert "no service answers at" in found["status.json"].problem
    assert "xl info ended with 3: told" == found["xl-info.txt"].problem
    assert found["xenstore.txt"].problem
    assert "xen-blkback: no\n" == found["kernel.log"].text
    assert found["service.log"].text.endswith("late\n")
    assert "early" not in found["service.log"].text
    assert "xenbackend " in found["version.txt"].text
    assert "there is no such file" in json.loads(found["settings.json"].text)["mistakes"][0]
    assert any(each["check"] == "service" for each in json.loads(found["doctor.json"].text))
