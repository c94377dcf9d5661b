"""Images of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.cli import demo_image
from xenbackend.errors import ConfigError

MIB = 1 << 20


def test_what_is_missing_is_made_and_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing image is created sparse, of at least 1 MiB, with a message; an existing image is kept."""
    image = tmp_path / "img"
    demo_image.make_missing(f"log:|aio:{image}", 512)
    said = capsys.readouterr().err
    demo_image.make_missing(f"log:|aio:{image}", 8 * MIB)

    assert (MIB, 0) == (image.stat().st_size, image.stat().st_blocks)
    assert f"{image} did not exist; it was created with 1 MiB\n" == said
    assert "" == capsys.readouterr().err


def test_nothing_else_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device, no image of a format and no parent directory is created."""
    device = Path("/dev/xenbackend-test-nosuch")
    monkeypatch.chdir("/")
    for name in (device, device.relative_to("/")):
        demo_image.make_missing(f"aio:{name}", MIB)
        is_made = device.exists()
        device.unlink(missing_ok=True)
        assert not is_made
    demo_image.make_missing(f"qcow2:{tmp_path}/img", MIB)
    with pytest.raises(ConfigError, match="is missing and cannot be made: No such file or directory"):
        demo_image.make_missing(f"aio:{tmp_path}/none/img", MIB)

    assert [] == list(tmp_path.iterdir())


def test_an_image_is_never_written_over(tmp_path: Path) -> None:
    """Creating an image that exists already fails."""
    assert 2 * MIB == demo_image.make(tmp_path / "img", 2 * MIB)
    with pytest.raises(FileExistsError):
        demo_image.make(tmp_path / "img", MIB)


def test_no_name_of_an_image_moves_a_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in an image's name are escaped in messages and errors."""
    demo_image.make_missing(f"aio:{tmp_path}/a\x1b[2J", MIB)
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        demo_image.make_missing(f"aio:{tmp_path}/\x1b[2J/img", MIB)
    said = capsys.readouterr().err

    assert "did not exist" in said
    assert "\x1b" not in said + str(caught.value)
