"""What is installed besides the package: the unit, the udev rules, the entry point."""

from __future__ import annotations

import argparse
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from xenbackend import __version__
from xenbackend.cli import run
from xenbackend.protocol.client import DEFAULT_SOCKET
from xenbackend.supervisor.vbd import ending
from xenbackend.supervisor.vbd.last_chains import DIRECTORY

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "systemd" / "xenbackend.service"


def _unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # systemd's names have capitals
    parser.read(UNIT)
    return parser


def test_version_and_entry_point() -> None:
    """The package has one version, and its entry point exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["xenbackend"].partition(":")

    assert __version__ == project["version"]
    assert ("xenbackend.cli.main", "main") == (module, function)


def test_the_unit_starts_a_command_that_parses() -> None:
    """The command accepts the arguments of ExecStart."""
    parser = argparse.ArgumentParser()
    run.register(parser.add_subparsers())
    program, *arguments = _unit()["Service"]["ExecStart"].split()

    assert "xenbackend" == Path(program).name
    assert "journal" == parser.parse_args(arguments).log


def test_the_unit_makes_the_directory_of_the_socket() -> None:
    """The default control socket is in RuntimeDirectory."""
    assert str(Path(DEFAULT_SOCKET).parent) == "/run/" + _unit()["Service"]["RuntimeDirectory"]


def test_the_unit_fits_the_service() -> None:
    """The unit needs a Xen host, starts between xenstored and the guests, and is told when the service is ready."""
    unit = _unit()

    assert "/proc/xen/capabilities" == unit["Unit"]["ConditionPathExists"]
    assert {"xenstored.service"} <= set(unit["Unit"]["After"].split())
    assert {"xendomains.service"} <= set(unit["Unit"]["Before"].split())
    assert ("notify", "on-failure") == tuple(unit["Service"][key] for key in ("Type", "Restart"))


def test_the_unit_keeps_what_serves_guests() -> None:
    """A restart leaves the workers running, and systemd keeps their descriptors and the sockets of booting guests."""
    service = _unit()["Service"]

    assert ("process", "restart") == (service["KillMode"], service["RuntimeDirectoryPreserve"])
    assert f"FDSTORE={service['FileDescriptorStoreMax']}" in service["Environment"].split()


def test_a_service_that_is_refused_rests() -> None:
    """A service that refuses to start, being older than the last one, is retried every 10 to 60 seconds.

    The pause is shorter than the time limit of a start, and systemd does not give up, as it would close the workers'
    descriptors.
    """
    service = _unit()["Service"]
    [rest_s] = [int(each.partition("=")[2]) for each in service["Environment"].split() if "REFUSED_REST_S" in each]

    assert 10 <= rest_s <= 60
    assert rest_s < 60 * int(service["TimeoutStartSec"].removesuffix("min"))
    assert "1" not in service["RestartPreventExitStatus"].split()


def test_a_service_that_stops_ends_before_systemd_ends_it() -> None:
    """The unit allows the time for which a stopping service waits for xenstore, and names its files' directory."""
    service = _unit()["Service"]

    assert ending.WAIT_S + 10 <= float(service["TimeoutStopSec"].removesuffix("s"))
    assert "STATE_DIRECTORY=/run" in service["Environment"].split()
    assert DIRECTORY != service["RuntimeDirectory"]  # systemd removes that one at a stop


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Systemd-analyze finds no fault once the program is where the unit expects it; Xen's manual may be missing."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/xenbackend", shutil.which("true") or "/bin/true"))
    verify = ["systemd-analyze", "verify", "--man=no", str(unit)]
    result = subprocess.run(verify, capture_output=True, text=True, check=False)

    assert (0, "") == (result.returncode, "".join(line for line in result.stderr.splitlines() if UNIT.name in line))


def test_the_unit_leaves_devices_alone() -> None:
    """The unit allows all block devices, any of which may hold a disk, and Xen's devices.

    They are listed because all others are denied once one is allowed by name, as `ProtectClock` does.
    """
    lines = UNIT.read_text().splitlines()
    allowed = {line.partition("=")[2] for line in lines if line.startswith("DeviceAllow=")}

    assert {"block-* rw", "char-misc rw"} <= allowed
    assert set() == {"PrivateDevices", "DevicePolicy"} & set(_unit()["Service"])


def _stage(site: Path, root: Path) -> dict[str, bytes]:
    """Return the files that the package in `site` installs, by path, with no other package importable."""
    root.mkdir()
    command = [sys.executable, "-P", "-m", "xenbackend", "install", "--packaged", "--root", str(root)]
    subprocess.run(command, check=True, capture_output=True, cwd=root, env={"PYTHONPATH": str(site)})
    return {str(each.relative_to(root)): each.read_bytes() for each in root.rglob("*") if each.is_file()}


@pytest.mark.slow
def test_a_wheel_brings_what_is_installed(tmp_path: Path) -> None:
    """The wheel alone, without a checkout, installs the same files as the checkout, byte for byte."""
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    installed = _stage(tmp_path / "site", tmp_path / "of-wheel")

    assert {"xenbackend"} == {name.split("/")[0].split("-")[0] for name in names}
    sources = {f"xenbackend/bench/c/{name}" for name in ("blkif.h", "blkif_loop.c", "ring_server.c")}
    assert sources == {name for name in names if "/bench/c/" in name}
    assert {"xenbackend.service", "60-xenbackend.rules"} <= {Path(each).name for each in installed}
    assert installed == _stage(ROOT, tmp_path / "of-checkout")


def test_debian_has_the_same_version() -> None:
    """The Debian package has the version of pyproject.toml."""
    first = (ROOT / "debian" / "changelog").read_text().splitlines()[0]

    assert first.startswith(f"xenbackend ({__version__}) ")


@pytest.mark.parametrize("has_disks", [True, False])
@pytest.mark.parametrize(
    ("arguments", "is_refused"),
    [
        ("upgrade 0.1.9", True), ("upgrade 0.2.0", False), ("upgrade 0.10.0", False), ("remove", True),
        ("remove in-favour other 1", True), ("deconfigure in-favour other 1", False),
        ("failed-upgrade 0.3.0 0.2.0", True), ("failed-upgrade 0.1.0 0.2.0", False), ("upgrade 0.2.0~rc1", True),
    ],
)  # fmt: skip
@pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg is not installed")
def test_debian_takes_no_service_away_while_disks_are_served(
    tmp_path: Path, arguments: str, *, has_disks: bool, is_refused: bool
) -> None:
    """While guests have disks, 0.2.0 is neither removed nor replaced by an older version; other steps are allowed."""
    for name, line in (
        ("dpkg-query", "echo 0.2.0"),
        ("python3", f'[ "$*" = "-I -m xenbackend.host.served" ] && exit {int(has_disks)}'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["sh", str(ROOT / "debian" / "xenbackend.prerm"), *arguments.split()],
        env={"PATH": f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (1 if is_refused and has_disks else 0) == result.returncode
    assert ("systemctl stop xenbackend" in result.stderr) == bool(result.returncode)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg is not installed")
def test_dpkg_heeds_the_refusal(tmp_path: Path) -> None:
    """Dpkg asks the older package's script too, which refuses what it should.

    A package whose removal was refused stays installed, and can be removed once no guest has a disk.
    """
    root, tools = tmp_path / "root", tmp_path / "tools"
    for directory in (root / "var/lib/dpkg/info", root / "var/lib/dpkg/updates", tools):
        directory.mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (tools / "python3").write_text(f"#!/bin/sh\ntest ! -e {tmp_path}/serves\n")
    (tools / "python3").chmod(0o755)
    for version in ("0.2.0", "0.3.0"):
        control = tmp_path / version / "DEBIAN"
        control.mkdir(parents=True)
        (control / "control").write_text(
            f"Package: xenbackend\nVersion: {version}\nArchitecture: all\nMaintainer: X <x@y>\nDescription: x\n"
        )
        shutil.copy(ROOT / "debian" / "xenbackend.prerm", control / "prerm")
        (control / "prerm").chmod(0o755)
        subprocess.run(["dpkg-deb", "--build", control.parent, tmp_path], check=True, capture_output=True)

    def dpkg(*words: str) -> tuple[int, str]:
        command = ["dpkg", f"--root={root}", "--force-not-root", "--force-script-chrootless", "--force-bad-path"]
        environment = {"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"}
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
        query = [
            "dpkg-query",
            f"--admindir={root}/var/lib/dpkg",
            "--show",
            "--showformat=${Version} ${db:Status-Status}",
            "xenbackend",
        ]
        return done.returncode, subprocess.run(query, capture_output=True, text=True, check=False).stdout

    def install(version: str) -> tuple[int, str]:
        return dpkg("--install", str(tmp_path / f"xenbackend_{version}_all.deb"))

    assert (0, "0.2.0 installed") == install("0.2.0")
    (tmp_path / "serves").touch()
    assert (0, "0.3.0 installed") == install("0.3.0")
    assert (1, "0.3.0 installed") == install("0.2.0")
    assert (1, "0.3.0 installed") == dpkg("--remove", "xenbackend")
    (tmp_path / "serves").unlink()
    assert (0, "0.2.0 installed") == install("0.2.0")
    assert (0, "") == dpkg("--remove", "xenbackend")


def test_udev_rules_have_the_form_of_udev() -> None:
    """Each line is a comment or a list of matches and assignments, and both devices have a rule."""
    lines = (ROOT / "udev" / "60-xenbackend.rules").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    item = r'[A-Z]+(==|=)"[^"]*"'

    assert [True] * len(rules) == [re.fullmatch(rf"{item}(, {item})*", rule) is not None for rule in rules]
    assert ["xen/gntdev", "xen/evtchn"] == [re.findall('KERNEL=="(.*?)"', rule)[0] for rule in rules]
    assert ['GROUP="xenbackend", MODE="0660"'] * 2 == [rule[rule.index("GROUP") :] for rule in rules]
