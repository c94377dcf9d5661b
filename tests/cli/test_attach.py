"""The commands attach and detach: arguments to calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.cli.main import main
from xenbackend.rig.store import Xenstored


def test_mistakes_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chain, a device or a domain that cannot be meant is exit status 2; a vbd that is not there is 1."""
    with Xenstored(tmp_path / "store") as xenstored:
        store = ["--store", xenstored.address]
        statuses = [
            main(["attach", "5", "xvdb", "nosuch:x", *store]),
            main(["attach", "5", "frob", "null:1G", *store]),
            main(["attach", "5", "xvdb", "null:1G", *store]),
            main(["detach", "5", "xvdb", *store]),
            main(["detach", "5", "xvdb", "--store", str(tmp_path / "none")]),
        ]
    lines = capsys.readouterr().err.splitlines()

    assert [2, 2, 2, 1, 1] == statuses
    assert "nosuch" in lines[0]
    assert "xenbackend: there is no domain 5; xl list shows them" in lines
    assert "xenbackend: domain 5 has no vbd xvdb of ours" in lines
    assert "cannot connect" in lines[-1]
