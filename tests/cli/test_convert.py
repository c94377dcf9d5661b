"""The command convert, on real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend.cli.main import main

LITERAL = b"name='\xff'\r# a comment\ndisk=['tap2:log:|aio:/img,xvda,w'] # \xfe"
PLAIN = b"disk=['phy:/dev/x,xvda,w']\n"
LINE = b"vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:/img"
TEXT = LITERAL.replace(b"\r", b"") + b"\n"
CONVERTED = TEXT.replace(b"tap2:log:|aio:/img,xvda,w", LINE)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration with a disk of ours."""
    file = tmp_path / "vm.cfg"
    file.write_bytes(TEXT)
    file.chmod(0o640)
    return file


def test_it_prints_the_file_with_its_lines_rewritten(config: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The file is printed with its disk lines rewritten and every other byte kept; the file itself is not changed."""
    assert main(["convert", str(config)]) == 0
    assert capfdbinary.readouterr().out == CONVERTED
    assert config.read_bytes() == TEXT


def test_the_version_decides_the_form(config: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """From Xen 4.19 on a disk of ours is written with its own kind."""
    assert main(["convert", "--xen-version", "4.20", str(config)]) == 0
    assert capfdbinary.readouterr().out == CONVERTED.replace(b"script=", b"backendtype=tap,script=")


def test_in_place_replaces_the_file_behind_a_link(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file keeps its mode, the link stays a link, and nothing else is left in the directory."""
    link = config.with_name("auto.cfg")
    link.symlink_to(config)

    assert main(["convert", "-i", str(link)]) == 0
    assert capsys.readouterr().out == f"{link}: rewritten disk lines: 1\n"
    assert (CONVERTED, 0o640, True) == (config.read_bytes(), config.stat().st_mode & 0o777, link.is_symlink())
    assert {config, link} == set(config.parent.iterdir())


def test_a_file_that_needs_nothing_is_not_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that needs no change is not written: its inode and time of change stay."""
    config.write_bytes(PLAIN)
    before = config.stat()

    assert main(["convert", "-i", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: unchanged\n"
    assert (before.st_ino, before.st_mtime_ns) == (config.stat().st_ino, config.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"disk=['tap2:log:|ayo:/img,xvda,w']", "bad.cfg:1: unknown driver 'ayo'"),
        (b"a=1\ndisk=['a'\n'b']", "bad.cfg:3: \"'b'\" comes after a value of a list"),
    ],
)
def test_one_bad_file_leaves_all_alone(
    config: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several files, none is written unless all can be parsed."""
    bad = config.with_name("bad.cfg")
    bad.write_bytes(content)

    assert main(["convert", "-i", str(config), str(bad)]) == 2
    assert said in capsys.readouterr().err
    assert (TEXT, content) == (config.read_bytes(), bad.read_bytes())


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file is named in the error, and the exit status is 2."""
    assert main(["convert", str(tmp_path / "none.cfg")]) == 2
    assert capsys.readouterr().err == f"xenbackend: {tmp_path}/none.cfg: No such file or directory\n"
