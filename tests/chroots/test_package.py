"""The Debian packages of `make deb` and `make deb-former` in a system of each release.

tests/xen/test_debian_package.py has a running system, with systemd, Xen and a guest under load.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chroots.place import Chroot
from tests.test_manpages import manpages
from xenbackend.block.drivers import BUILT_IN

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PLACES = ("etc", "lib/systemd", "run", "usr/bin", "usr/lib", "usr/share", "var/lib")
SETTINGS = "etc/xenbackend.toml"


def package(directory: Path) -> Path:
    """Return the package that was built there."""
    found = sorted(directory.glob("xenbackend_*_all.deb"))
    if not found:
        pytest.skip(f"there is no package in {directory}: make deb deb-former")
    return found[-1]


def ours(chroot: Chroot) -> list[Path]:
    """Return the paths that bear our name, or that of our hotplug script's alias."""
    found = [
        each for place in PLACES for name in ("*xenbackend*", "tap2") for each in (chroot.root / place).rglob(name)
    ]
    return [each for each in found if "dpkg/info" not in str(each)]


def installed(chroot: Chroot) -> str:
    """Return the version that is installed, empty if there is none."""
    format_ = "--showformat=${db:Status-Status} ${Version}"
    said = chroot.run("dpkg-query", "--show", format_, "xenbackend", check=False).stdout.split()
    return said[1] if said[:1] == ["installed"] else ""


@pytest.fixture
def fresh(chroot: Chroot) -> Iterator[Chroot]:
    """A chroot without any file of ours, before and after the test."""
    assert [] == ours(chroot)
    yield chroot
    chroot.run("dpkg", "--purge", "xenbackend", check=False)


def test_it_works_where_it_is_installed(fresh: Chroot) -> None:
    """The demo serves a disk with nothing but what the package has installed."""
    fresh.run("dpkg", "--install", fresh.put(package(DIST)))
    said = json.loads(fresh.run("xenbackend", "demo", "--json", "--area", "4M").stdout)

    assert {"bytes", "requests"} <= said["phases"][0].keys()
    assert said["counters"]["writes"] > 0
    assert 0 == said["counters"]["bugs"]


def test_manual_pages_and_completions_are_in_it(fresh: Chroot) -> None:
    """Each command, driver, the settings and the script have a manual page, and each shell has its completion."""
    fresh.run("dpkg", "--install", fresh.put(package(DIST)))
    pages = {("1", "-".join(["xenbackend", *words])) for words, _ in manpages.commands()}
    pages |= {("7", f"xenbackend-{name}") for name in BUILT_IN}
    pages |= {("5", "xenbackend.toml"), ("8", "block-xenbackend")}
    found = {
        (match[1], match[2])
        for line in fresh.run("dpkg", "--listfiles", "xenbackend").stdout.splitlines()
        if (match := re.fullmatch(r"/usr/share/man/man(\d)/(.*)\.\d\.gz", line))
    }
    shown = fresh.run("man", "--pager=cat", "5", "xenbackend.toml").stdout
    bash = fresh.root / "usr/share/bash-completion/completions/xenbackend"

    assert pages == found
    assert "poll_us" in shown
    for shell in ("zsh/vendor-completions/_xenbackend", "fish/vendor_completions.d/xenbackend.fish"):
        assert "xenbackend" in (fresh.root / "usr/share" / shell).read_text()
    fresh.run("bash", "-n", Path("/", bash.relative_to(fresh.root)))


def test_an_upgrade_keeps_what_the_admin_wrote(fresh: Chroot) -> None:
    """An upgrade keeps the last release's settings file as the admin edited it, and the unit's path."""
    fresh.run("dpkg", "--install", fresh.put(package(DIST / "former")))
    settings = fresh.root / SETTINGS
    settings.write_text('log_level = "debug"\n' + settings.read_text())
    fresh.run("dpkg", "--force-confold", "--install", fresh.put(package(DIST)))

    assert "debug" == tomllib.loads(settings.read_text())["log_level"]
    assert "debug" == json.loads(fresh.run("xenbackend", "config", "show", "--json").stdout)["settings"]["log_level"]
    for unit in ("usr/lib/systemd/system/xenbackend.service", "usr/lib/udev/rules.d/60-xenbackend.rules"):
        assert (fresh.root / unit).is_file(), unit
    fresh.run("xenbackend", "run", "--check")
    fresh.run("xenbackend", "demo", "--area", "4M")


def test_its_pages_lead_to_files_that_it_has(fresh: Chroot) -> None:
    """Each link of an installed page leads to an installed file, except to sources and to what is for contributors."""
    fresh.run("dpkg", "--install", fresh.put(package(DIST)))
    top = fresh.root / "usr/share/doc/xenbackend"
    pages = sorted(top.rglob("*.md"))
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    named = {os.path.normpath(page.parent.relative_to(top) / link) for page, link in links if "://" not in link}
    missing = {name for name in named if not (top / name).exists()}

    assert {"CHANGELOG.md", "docs/upgrade.md", "docs/prometheus/dashboard.json"} <= named
    assert {"CONTRIBUTING.md"} >= {name for name in missing if not name.startswith("xenbackend/")}


def test_purged_it_leaves_nothing(fresh: Chroot) -> None:
    """After a removal only the settings are left; after a purge nothing, whichever release was there before."""
    for former in (False, True):
        if former:
            fresh.run("dpkg", "--install", fresh.put(package(DIST / "former")))
        fresh.run("dpkg", "--force-confnew", "--install", fresh.put(package(DIST)))
        fresh.run("xenbackend", "demo", "--area", "4M")
        fresh.run("dpkg", "--remove", "xenbackend")
        kept = [each.relative_to(fresh.root).as_posix() for each in ours(fresh) if each.is_file()]
        fresh.run("dpkg", "--purge", "xenbackend")

        assert (SETTINGS in kept, "") == (True, installed(fresh))
        assert [] == ours(fresh)


# A simulated host stands for Xen: the package's scripts ask at the socket that the settings name.
_REMOVE_TWICE = """\
mkfifo /root/said
xenbackend demo --keep --json >/root/said &
exec 3</root/said
read -r said <&3
socket=$(echo "$said" | sed 's/.*"socket": "\\([^"]*\\)".*/\\1/')
sed -i "1i socket = \\"$socket\\"" /etc/xenbackend.toml
dpkg --remove xenbackend && echo removed
kill -INT $!
wait $!
dpkg --remove xenbackend && echo removed then
rm /root/said
"""


def test_it_is_not_removed_below_a_guest(fresh: Chroot) -> None:
    """Removal is refused while guests have disks, which are named with a remedy; once none has, it succeeds."""
    fresh.run("dpkg", "--install", fresh.put(package(DIST)))
    done = fresh.run("bash", "-m", "-c", _REMOVE_TWICE, check=False)

    assert ["removed then"] == [line for line in done.stdout.splitlines() if line.startswith("removed")], done.stderr
    assert "guests have disks: 5/xvda" in done.stderr
    assert "systemctl stop xenbackend, remove" in done.stderr


def test_lintian_has_nothing_to_say(chroot: Chroot) -> None:
    """Each release's own lintian reports no error and no warning."""
    said = chroot.run("lintian", "--allow-root", "--fail-on", "error,warning", chroot.put(package(DIST)), check=False)

    assert (0, "") == (said.returncode, said.stdout), said.stderr
