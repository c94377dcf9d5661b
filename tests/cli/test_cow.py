"""`xenbackend cow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.cli.main import main


def test_a_file_is_named_whole_and_the_new_chain_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service gets the file's absolute path, and the new chain is printed for the guest's configuration."""
    monkeypatch.chdir(tmp_path)
    with answering(tmp_path / "s", working) as control:
        assert 0 == main(["cow", "keep", "5/xvda", "kept.cow", "--socket", control.path])

    assert [{"verb": "keep", "vbd": "5/xvda", "file": f"{tmp_path}/kept.cow"}] == control.asked
    assert "log:|aio:/img\n" == capsys.readouterr().out


@pytest.mark.parametrize("force", [False, True])
def test_only_who_says_so_gives_a_guest_another_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, force: bool
) -> None:
    """`cow drop` passes --force on to the service, which decides."""
    with answering(tmp_path / "s", working) as control:
        assert 0 == main(["cow", "drop", "5/xvda", *["--force"] * force, "--socket", control.path])

    assert [{"verb": "drop", "vbd": "5/xvda", "force": force}] == control.asked
    assert "5/xvda has the contents of the layer below cow: again\n" == capsys.readouterr().out
