"""Looks at this host: Xen, its devices, the hotplug script, the settings, and the kernel's remaining resources.

Must not ask the service, load a module, or start anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from xenbackend import settings_file
from xenbackend.doctor.finding import Finding, ok, unknown, wrong
from xenbackend.doctor.place import CAPABILITIES
from xenbackend.errors import ConfigError, printable
from xenbackend.host.files import SCRIPTS, script_text
from xenbackend.supervisor.service import settings

DEVICES = {"gntdev": "xen-gntdev", "evtchn": "xen-evtchn"}  # in /dev/xen, with the module that provides each
SCRIPT = f"{SCRIPTS}/block-xenbackend"
AIO_EACH = 256  # the share of fs.aio-max-nr that a worker takes, docs/capacity.md
_AIO_WANTED = 1 << 20
_FULL = 0.95  # of a limit: what remains is not enough for another guest
_GUEST = "this is a guest of Xen, which may serve others as a driver domain"
_ROOT = Path("/")


def look(root: Path = _ROOT, config: Path | None = None) -> list[Finding]:
    """Return the findings about a Xen host; `root` is the root of its file system, `config` its settings file."""
    found = [_xen(root)]
    if not found[0].is_wrong:
        found += [_devices(root), _script(root)]
        found += [_devd(root)] if found[0].sentence == _GUEST else []
    return [*found, *look_at_kernel(root), _settings(config)]


def look_at_kernel(root: Path = _ROOT) -> list[Finding]:
    """Return findings about the kernel's resources for more disks, with or without Xen."""
    return [_aio(root), _files(root)]


def _xen(root: Path) -> Finding:
    try:
        is_control = "control_d" in (root / CAPABILITIES).read_text()
        return ok("xen", "this is a control domain of Xen" if is_control else _GUEST)
    except FileNotFoundError:
        sentence = "this system was booted without Xen, or its xenfs is not mounted at /proc/xen"
    except OSError as error:
        return unknown("xen", f"/{CAPABILITIES} cannot be read: {error.strerror}")
    return wrong("xen", sentence, "ls /sys/hypervisor /proc/xen")


def _devices(root: Path) -> Finding:
    missing = [each for each in DEVICES if not (root / "dev/xen" / each).exists()]
    if not missing:
        return ok("devices", "/dev/xen/gntdev and /dev/xen/evtchn are there")
    names = " and ".join(f"/dev/xen/{each}" for each in missing)
    modules = " ".join(DEVICES[each] for each in missing)
    return wrong("devices", f"there is no {names}: no guest's memory can be reached", f"modprobe -a {modules}")


def _devd(root: Path) -> Finding:
    """Look for `xl devd`, which runs hotplug scripts in a driver domain, as xl does in dom0."""
    if not (root / "proc/1/cmdline").exists():
        return unknown("devd", "this user may not see the processes of others", "sudo xenbackend doctor")
    for each in (root / "proc").glob("[0-9]*/cmdline"):
        try:
            program, *words = each.read_bytes().split(b"\0")
        except OSError:  # the process has ended
            continue
        if program.rpartition(b"/")[2] == b"xl" and b"devd" in words:
            return ok("devd", f"xl devd runs, process {each.parent.name}")
    sentence = "xl devd does not run in this domain: nothing runs the hotplug script, and guests get no disk"
    return wrong("devd", sentence, "xl devd  # docs/driver-domains.md has a unit for it")


def _script(root: Path) -> Finding:
    """Look at the script that xl, or in a driver domain `xl devd`, runs for each disk."""
    place = root / SCRIPT.lstrip("/")
    again = "xenbackend install"
    try:
        first, _, text = place.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return wrong("script", f"there is no {SCRIPT}, which xl runs for each disk", again)
    except OSError as error:
        return unknown("script", f"{SCRIPT} cannot be read: {error.strerror}")
    if not place.stat().st_mode & 0o111:
        return wrong("script", f"{SCRIPT} is not executable", f"chmod 755 {SCRIPT}")
    program = Path(os.fsdecode(first.removeprefix(b"#!").split(b" ")[0]))
    if not (root / str(program).lstrip("/")).exists():
        sentence = f"{SCRIPT} is for the interpreter {printable(str(program))}, which is not there"
        return wrong("script", sentence, again)
    if text != script_text():
        return wrong("script", f"{SCRIPT} is from another version of xenbackend", again)
    return ok("script", f"{SCRIPT} is there")


def _settings(config: Path | None) -> Finding:
    place = config or settings_file.PATH
    try:
        settings.load(config, {})
    except settings.SettingsError as error:
        return wrong("settings", printable(error.mistakes[0]), "xenbackend run --check")
    except ConfigError as error:
        if isinstance(error.__context__, PermissionError):
            return unknown("settings", printable(str(error)))
        return wrong("settings", printable(str(error)), "xenbackend run --check")
    return ok("settings", f"{place} can be used" if place.exists() else "every setting has its default")


def _aio(root: Path) -> Finding:
    def compare(used: int, most: int) -> Finding:
        if used + AIO_EACH <= most:
            return ok("aio", f"{used} of {most} asynchronous requests are in use (fs.aio-max-nr)")
        sentence = f"{used} of {most} asynchronous requests are in use, so further disks use threads and are slower"
        return wrong("aio", sentence, f"sysctl -w fs.aio-max-nr={max(_AIO_WANTED, 2 * most)}")

    return _limited("aio", ("proc/sys/fs/aio-nr", "proc/sys/fs/aio-max-nr"), root, compare)


def _files(root: Path) -> Finding:
    def compare(used: int, most: int) -> Finding:
        if used < most * _FULL:
            return ok("files", f"{used} files are open on this host, of at most {most} (fs.file-max)")
        sentence = f"{used} of {most} files are open on this host (fs.file-max)"
        return wrong("files", sentence, f"sysctl -w fs.file-max={2 * most}")

    return _limited("files", ("proc/sys/fs/file-nr", "proc/sys/fs/file-max"), root, compare)


def _limited(check: str, names: tuple[str, str], root: Path, compare: Callable[[int, int], Finding]) -> Finding:
    """Call `compare` with the first number in each of two files: what is used, and the limit."""
    try:
        used, most = (int((root / each).read_text().split()[0]) for each in names)
    except (OSError, ValueError, IndexError) as error:
        return unknown(check, f"/{names[0]} cannot be read: {error}")
    return compare(used, most)
