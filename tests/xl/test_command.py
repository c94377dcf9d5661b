"""Xl's command line, before and after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xenbackend.errors import ChainError, ConfigError
from xenbackend.xl.command import translate

XEN = (4, 17)
LITERAL = "name='it'\ndisk=['tap2:log:|aio:/img,xvda,w']\n"
LINE = "vdev=xvda,access=rw,script=block-xenbackend,target=log:|aio:/img"
ARGUMENT = f"disk=['{LINE}']"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with configurations: vm.cfg has a disk of ours, plain.cfg none, broken.cfg is invalid."""
    monkeypatch.chdir(tmp_path)
    Path("vm.cfg").write_text(LITERAL)
    Path("a=b.cfg").write_text(LITERAL)
    Path("plain.cfg").write_text("disk=['phy:/dev/x,xvda,w']\n")
    Path("broken.cfg").write_text("disk=['tap2:log:|aio:/img,xvda,w'\n")
    Path("wrong.cfg").write_text("\ndisk=['tap2:log:|ayo:/img,xvda,w']\n")
    Path("save").write_bytes(b"Xen saved domain, xl format\n")
    os.mkfifo("pipe")
    return tmp_path


def run(line: str, *more: str) -> list[str]:
    """Return xl's arguments for a command line; a file made for xl is shown as <its text>."""
    return translate([*line.split(), *more], XEN, lambda text: f"<{text}>")


@pytest.mark.parametrize(
    "line",
    [
        "create vm.cfg",
        "create vm.cfg -c",
        "create -c vm.cfg",
        "create -pf vm.cfg",
        "create --quiet --dryrun --defconfig vm.cfg",
        "create --defconfig=a=b.cfg",
        "create --defc vm.cfg",
        "create plain.cfg -f vm.cfg",
        "create -f plain.cfg -f vm.cfg",
        "create memory=64 vm.cfg vcpus=2",
        "create -- vm.cfg",
        "-vv -N create vm.cfg",
        "-N -- cr -n vm.cfg",
        "config-update 5 vm.cfg",
        "conf guest -d -f vm.cfg",
    ],
)
def test_the_disks_stand_last(line: str) -> None:
    """The arguments are kept, and one setting with all disks is added at the end."""
    assert [*line.split(), ARGUMENT] == run(line)


def test_settings_among_the_words_count_too() -> None:
    """Settings on the command line count after the file, as in xl: they may add to it, replace it, or stand alone."""
    more = "disk+=['tap2:aio:/b,xvdb,r']"
    aio = "vdev=xvdb,access=ro,script=block-xenbackend,target=aio:/b"

    assert ["create", "vm.cfg", more, f"disk=['{LINE}','{aio}']"] == run("create vm.cfg", more)
    assert ["create", "vm.cfg", "disk=[]"] == run("create vm.cfg disk=[]")
    assert ["create", "/dev/null", more, f"disk=['{aio}']"] == run("create /dev/null", more)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "list",
        "-v",
        "-x create vm.cfg",
        "create",
        "create plain.cfg",
        "create vm.cfg -f plain.cfg",
        "create broken.cfg",
        "create none.cfg",
        "create pipe",
        "create .",
        "create vm.cfg plain.cfg",
        "create vm.cfg --unheard-of",
        "create -h vm.cfg",
        "create vm.cfg -f",
        "c vm.cfg",
        "console vm.cfg",
        "config-update",
        "config-update 5",
        "config-update vm.cfg",
        "restore save",
        "restore plain.cfg save",
        "restore -z vm.cfg save",
        "save 5 save",
        "save 5 save plain.cfg",
        "migrate 5 host",
        "migrate -C plain.cfg 5 host",
        "migrate-receive -e",
        "block-attach",
        "block-attach 5",
        "block-attach 5 phy:/dev/x xvdb w",
        "block-list tap2:log:|aio:/img,xvda,w",
        "block-detach 5 xvda",
    ],
)
def test_everything_else_is_passed_on_as_it_is(line: str) -> None:
    """Other commands, files without a disk of ours, and what xl refuses reach xl unchanged."""
    assert line.split() == run(line)


@pytest.mark.parametrize(
    ("line", "translated"),
    [
        ("restore vm.cfg save", "restore -- <> save"),
        ("-v restore -p vm.cfg -e save", "-v restore -p -e -- <> save"),
        ("rest --vncviewer vm.cfg save", "rest --vncviewer -- <> save"),
        ("save -c 5 save vm.cfg", "save -c -- 5 save <>"),
        ("migrate -C vm.cfg 5 host", "migrate -C vm.cfg -C <> -- 5 host"),
        ("migrate 5 host --live -sssh -Cvm.cfg", "migrate --live -s ssh -C vm.cfg -C <> -- 5 host"),
    ],
)
def test_commands_without_settings_get_a_file(line: str, translated: str) -> None:
    """Commands that ignore settings get another file; options keep their values."""
    assert translated.split() == [
        "<>" if word == f"<{LITERAL.replace('tap2:log:|aio:/img,xvda,w', LINE)}>" else word for word in run(line)
    ]


def test_an_empty_value_of_an_option_stays() -> None:
    """`migrate -s ''`, which runs the host as a command, keeps its empty value."""
    words = run("migrate -C vm.cfg -s", "", "5", "cat")

    assert words[:5] == ["migrate", "-C", "vm.cfg", "-s", ""]
    assert words[-3:] == ["--", "5", "cat"]


@pytest.mark.parametrize(
    ("line", "translated"),
    [
        ("block-attach 5 tap2:log:|aio:/img,xvda,w", f"block-attach -- 5 {LINE}"),
        ("-N block-a 5 tap2:log:|aio:/img xvda w", f"-N block-a -- 5 {LINE}"),
        ("block-attach 5 tap2:log:|aio:/img vdev=xvda access=w", f"block-attach -- 5 {LINE}"),
        ("block-attach 5 vdev=xvda tap2:log:|aio:/img", f"block-attach -- 5 {LINE}"),
    ],
)
def test_a_disk_may_come_in_several_words(line: str, translated: str) -> None:
    """block-attach accepts a disk in one or several words; xl gets one."""
    assert translated.split() == run(line)


def test_a_wrong_disk_is_refused_with_its_place() -> None:
    """The error names the file and the line, or the command."""
    with pytest.raises(ChainError, match=r"^wrong\.cfg:2: unknown driver"):
        run("create wrong.cfg")
    with pytest.raises(ChainError, match=r"^wrong\.cfg:2: unknown driver"):
        run("restore wrong.cfg save")
    with pytest.raises(ChainError, match=r"^block-attach: unknown driver"):
        run("block-attach 5 tap2:log:|ayo:/img,xvda,w")
    with pytest.raises(ConfigError, match=r"^block-attach: .*names no device"):
        run("block-attach 5 tap2:log:|aio:/img")


def test_a_file_may_hold_any_byte(folder: Path) -> None:
    """A name that is not valid UTF-8 reaches xl with the bytes of the file."""
    (folder / "bytes.cfg").write_bytes(b"disk=['tap2:aio:/\xff,xvda,w']")

    assert os.fsencode(run("create bytes.cfg")[-1]).endswith(b",target=aio:/\xff']")
