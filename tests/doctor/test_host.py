"""Looks at a host, in a directory that has the files of a Xen host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from xenbackend.doctor import host
from xenbackend.doctor.finding import Verdict
from xenbackend.host.files import script_text

Break = Callable[[Path], object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with the files of a sound host."""
    for name, text in {
        "proc/xen/capabilities": "control_d\n", "proc/sys/fs/aio-nr": "512\n", "proc/sys/fs/aio-max-nr": "65536\n",
        "proc/sys/fs/file-nr": "1000\t0\t100000\n", "proc/sys/fs/file-max": "100000\n", "dev/xen/gntdev": "",
        "dev/xen/evtchn": "", "usr/bin/python3": "", "xenbackend.toml": "poll_us = 5\n",
        "proc/1/cmdline": "/sbin/init\0",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = tmp_path / "etc/xen/scripts/block-xenbackend"
    script.parent.mkdir(parents=True)
    script.write_bytes(b"#!/usr/bin/python3 -IS\n" + script_text())
    script.chmod(0o755)
    return tmp_path


def write(name: str, text: str) -> Break:
    """Return a function that overwrites a file."""
    return lambda root: (root / name).write_text(text)


def remove(name: str) -> Break:
    """Return a function that removes a file."""
    return lambda root: (root / name).unlink()


DEVD = "xl devd  # docs/driver-domains.md has a unit for it"
SCRIPT = "etc/xen/scripts/block-xenbackend"


def test_a_sound_host_has_nothing_wrong(root: Path) -> None:
    """On a sound host every look finds all well, without a command."""
    findings = host.look(root, root / "xenbackend.toml")

    assert ["xen", "devices", "script", "aio", "files", "settings"] == [each.check for each in findings]
    assert {(Verdict.OK, "")} == {(each.verdict, each.command) for each in findings}


@pytest.mark.parametrize(
    ("breaks", "check", "sentence", "command"),
    [
        (remove("proc/xen/capabilities"), "xen", "booted without Xen", "ls /sys/hypervisor /proc/xen"),
        (write("proc/xen/capabilities", "\n"), "devd", "xl devd does not run in this domain", DEVD),
        (remove("dev/xen/evtchn"), "devices", "there is no /dev/xen/evtchn:", "modprobe -a xen-evtchn"),
        (remove(SCRIPT), "script", f"there is no /{SCRIPT}", "xenbackend install"),
        (lambda root: (root / SCRIPT).chmod(0o644), "script", "is not executable", f"chmod 755 /{SCRIPT}"),
        (remove("usr/bin/python3"), "script", "the interpreter /usr/bin/python3, which is not", "xenbackend install"),
        (write(SCRIPT, "#!/usr/bin/python3\npass\n"), "script", "is from another version", "xenbackend install"),
        (write("proc/sys/fs/aio-nr", "65500"), "aio", "65500 of 65536", "sysctl -w fs.aio-max-nr=1048576"),
        (write("proc/sys/fs/file-nr", "99000\t0\t100000"), "files", "99000 of 100000", "sysctl -w fs.file-max=200000"),
        (write("xenbackend.toml", "\npol_us = 5\n"), "settings", "xenbackend.toml:2: there is no setting pol_us",
         "xenbackend run --check"),
        (write("xenbackend.toml", "pol"), "settings", "is not TOML", "xenbackend run --check"),
    ],
)  # fmt: skip
def test_each_thing_that_is_broken_is_one_finding(
    root: Path, breaks: Break, check: str, sentence: str, command: str
) -> None:
    """Each fault is one finding with a command, and its consequences are no findings."""
    breaks(root)
    [found] = [each for each in host.look(root, root / "xenbackend.toml") if each.verdict is not Verdict.OK]

    assert (Verdict.WRONG, check, command) == (found.verdict, found.check, found.command)
    assert sentence in found.sentence


def test_a_driver_domain_is_no_mistake(root: Path) -> None:
    """A driver domain, which is a guest, is no fault; it needs `xl devd`, which takes the part of xl."""
    write("proc/xen/capabilities", "")(root)
    (root / "proc/77").mkdir()
    write("proc/77/cmdline", "/usr/sbin/xl\0devd\0-F\0")(root)
    findings = host.look(root, root / "xenbackend.toml")
    write("proc/77/cmdline", "vi\0devd\0")(root)
    without = host.look(root, root / "xenbackend.toml")
    remove("proc/1/cmdline")(root)  # as with hidepid, see proc(5)
    hidden = host.look(root, root / "xenbackend.toml")

    assert ["xen", "devices", "script", "devd", "aio", "files", "settings"] == [each.check for each in findings]
    assert {Verdict.OK} == {each.verdict for each in findings}
    assert "a guest of Xen, which may serve others" in findings[0].sentence
    assert "xl devd runs, process 77" == findings[3].sentence
    assert Verdict.WRONG is without[3].verdict
    assert Verdict.UNKNOWN is hidden[3].verdict


def test_what_cannot_be_read_is_not_known(root: Path) -> None:
    """A file that is missing or malformed makes a finding unknown."""
    remove("proc/sys/fs/aio-max-nr")(root)
    write("proc/sys/fs/file-nr", "none")(root)
    found = {each.check: each.verdict for each in host.look(root, root / "xenbackend.toml")}

    assert (Verdict.UNKNOWN, Verdict.UNKNOWN) == (found["aio"], found["files"])
