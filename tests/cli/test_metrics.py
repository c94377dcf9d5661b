"""`xenbackend metrics`: printed, or written to a file for a collector."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import pytest

from tests.answering import answering, working
from xenbackend.cli.main import main
from xenbackend.cli.metrics import FILE, _address


def test_it_prints_what_the_service_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each call asks the service once and gives no order, so anybody who may see the status may run it."""
    with answering(tmp_path / "x", working) as control:
        assert 0 == main(["metrics", "--socket", control.path])
        asked = {each["verb"] for each in control.asked}
    said = capsys.readouterr().out

    assert {"ping", "status"} == asked
    assert "xenbackend_up 1\n" in said
    assert 'xenbackend_disk_requests_total{disk="5/xvda",guest="mail",operation="read"} 7\n' in said


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9917", ("127.0.0.1", 9917)), ("[::1]:1", ("::1", 1)), ("localhost:0", ("localhost", 0)),
     ("0.0.0.0:1", None), ("[::]:1", None), (":1", None), ("10.0.0.1:80", None), ("127.0.0.1:65536", None)],
)  # fmt: skip
def test_it_listens_to_this_host_only(text: str, address: tuple[str, int] | None) -> None:
    """Clients are not authenticated, so only loopback addresses are accepted."""
    if address is not None:
        assert address == _address(text)
        return
    with pytest.raises(argparse.ArgumentTypeError):
        _address(text)


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """The file is replaced as a whole, readable for all users, and nothing else is left; it says if no service runs."""
    place = tmp_path / "collected"
    place.mkdir()
    with answering(tmp_path / "x", working) as control:
        assert 0 == main(["metrics", "--textfile", str(place), "--socket", control.path])
    written = (place / FILE).read_text()
    assert 1 == main(["metrics", "--textfile", str(place), "--socket", str(tmp_path / "none")])

    assert "xenbackend_up 1\n" in written
    assert "xenbackend_up 0\n" in (place / FILE).read_text()
    assert "xenbackend_disk" not in (place / FILE).read_text()
    assert 0o644 == (place / FILE).stat().st_mode & 0o777
    assert [place / FILE] == list(place.iterdir())


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A place that is not a directory is the operator's mistake; if the last step fails, no draft is left."""
    (tmp_path / FILE).mkdir()
    (tmp_path / FILE / "x").touch()
    with answering(tmp_path / "x", working) as control:
        assert 2 == main(["metrics", "--textfile", str(tmp_path / "missing"), "--socket", control.path])
        assert 2 == main(["metrics", "--textfile", str(tmp_path), "--socket", control.path])

    assert f"{tmp_path / FILE} cannot be written" in capsys.readouterr().err
    assert [FILE] == [each.name for each in tmp_path.iterdir() if FILE in each.name]


def test_a_full_directory_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the file system is full, the command ends with 1, keeps the former file, and leaves no draft."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / FILE).write_text("former")
    monkeypatch.setattr(Path, "replace", fail)
    with answering(tmp_path / "x", working) as control:
        assert 1 == main(["metrics", "--textfile", str(tmp_path), "--socket", control.path])

    assert f"{tmp_path / FILE} cannot be written: No space left on device" in capsys.readouterr().err
    assert "former" == (tmp_path / FILE).read_text()
    assert [FILE] == [each.name for each in tmp_path.iterdir() if FILE in each.name]
