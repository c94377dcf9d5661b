"""The command xl, with a real process in xl's place that prints its arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xenbackend.cli.main import main

LINE = "vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:/img"
SAYS = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where xl is found; vm.cfg in it has a disk of ours."""
    (tmp_path / "vm.cfg").write_text("disk=['tap2:log:|aio:/img,xvda,w']\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def run(host: Path, *words: str, xl: str = SAYS, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command with a shell script as xl."""
    (host / "xl").write_text(xl)
    (host / "xl").chmod(0o755)
    command = [sys.executable, "-m", "xenbackend", "xl", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, input=stdin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["list"],
        ["-v", "-N", "list", "--help", "--", "-x"],
        ["create", "-c", "none.cfg", "--", "--json", "--version", "a b", ""],
        ["--", "--xen-version", "4.19"],
    ],
)
def test_xl_gets_every_word_as_it_is(host: Path, words: list[str]) -> None:
    """Every argument reaches xl unchanged, whatever it looks like; none is taken as an option of ours."""
    assert words == run(host, *words).stdout.split("\n")[: len(words)]


@pytest.mark.slow
def test_a_disk_of_ours_is_rewritten_for_the_version(host: Path) -> None:
    """`create` gets one more setting; --xen-version names the Xen that it is for, and does not reach xl."""
    file = str(host / "vm.cfg")

    assert f"create\n{file}\ndisk=['{LINE}']\n" == run(host, "--xen-version", "4.17", "create", file).stdout
    since = run(host, "--xen-version", "4.19", "create", file).stdout
    assert f"disk=['{LINE.replace('script', 'backendtype=tap,script')}']" == since.splitlines()[-1]


@pytest.mark.slow
def test_a_file_for_xl_ends_with_xl(host: Path) -> None:
    """If xl needs a whole file, it can open that as a regular one, even behind a shell, and none is left behind."""
    before = set(host.iterdir())
    xl = '#!/bin/sh\n# a wrapper\nexec sh -c \'stat -Lc %F "$3"; cat "$3"; readlink "$3"\' sh "$@"\n'
    said = run(host, "restore", str(host / "vm.cfg"), "save", xl=xl).stdout.splitlines()

    assert ["regular file", f"disk=['{LINE}']", "/memfd:config (deleted)"] == said
    assert {host / "xl"} == set(host.iterdir()) - before


@pytest.mark.slow
def test_what_becomes_of_xl_is_what_becomes_of_us(host: Path) -> None:
    """Standard input, exit status and signals are those of xl, and xl ignores no signal because of us."""
    assert "typed" == run(host, "console", "1", xl="#!/bin/sh\ncat", stdin="typed").stdout
    assert 7 == run(host, "list", xl="#!/bin/sh\nexit 7").returncode
    assert -signal.SIGTERM == run(host, "list", xl="#!/bin/sh\nkill -TERM $$").returncode
    ignored = run(host, "list", xl="#!/bin/sh\nexec grep SigIgn /proc/self/status").stdout

    assert 0 == int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@pytest.mark.slow
def test_a_wrong_chain_stops_before_xl(host: Path) -> None:
    """A wrong chain is shown with its place and ends with status 2, and xl is not started."""
    (host / "vm.cfg").write_text("disk=['tap2:log:|ayo:/img,xvda,w']\n")
    ended = run(host, "create", str(host / "vm.cfg"), xl="#!/bin/sh\ntouch started")

    assert (2, "") == (ended.returncode, ended.stdout)
    assert ended.stderr.startswith(f"xenbackend: {host}/vm.cfg:1: unknown driver 'ayo'")
    assert not Path("started").exists()


def test_help_is_ours_where_xl_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    """`xenbackend xl --help` describes the command; `xl create --help` is xl's own."""
    assert main(["xl", "--help"]) == 0
    assert "Run xl with these arguments" in capsys.readouterr().out


def test_a_wrong_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid version of Xen is refused with status 2."""
    assert main(["xl", "--xen-version", "new", "list"]) == 2
    assert "'new' is not a version of Xen" in capsys.readouterr().err
