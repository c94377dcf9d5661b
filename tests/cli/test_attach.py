"""The commands attach and detach: arguments to calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.cli.main import main
from xenbackend.rig.store import Xenstored


def test_a_file_is_named_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative file would be another one where the service runs: it is refused, and nothing is written."""
    with Xenstored(tmp_path / "store") as xenstored:
        xenstored.add_domain_socket(5)
        nodes = xenstored.dump()
        status = main(["attach", "5", "xvdb", "log:x.rec|null:1G", "--store", xenstored.address])
        untouched = xenstored.dump() == nodes

    assert (2, True) == (status, untouched)
    assert (
        f"option record: x.rec is seen from where the service runs; write the whole path, such as {Path.cwd()}/x.rec"
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize("timeout", ["nan", "-1", "soon"])
def test_a_timeout_is_a_duration(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no duration is refused with a sentence before anything is done."""
    with pytest.raises(SystemExit) as exit_:
        main(["detach", "5", "xvdb", "--timeout", timeout])

    assert 2 == exit_.value.code
    assert f"{timeout!r} is not a duration" in capsys.readouterr().err


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
