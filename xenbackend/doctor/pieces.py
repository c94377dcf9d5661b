"""The pieces of a fault report: texts about host, service and disks, each of which is gathered in its own process.

Must not read an image, a file with a passphrase or a key, an environment, the text of a unit, or memory.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from xenbackend import __version__
from xenbackend.doctor import nodes, service
from xenbackend.doctor.examine import Wanted, examine, load_or_default
from xenbackend.doctor.finding import unknown
from xenbackend.doctor.place import Place, here
from xenbackend.doctor.probes import Probe, Result, run
from xenbackend.doctor.scrub import scrub
from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.host import activate
from xenbackend.host.files import UNIT
from xenbackend.protocol.client import call
from xenbackend.supervisor.service import settings
from xenbackend.supervisor.xenstore.store import Store, find_address

MOST = 4 << 20  # characters of one piece; of a log, the last ones
LIMIT_S = 8.0
_LINES = 5000  # of a journal
_DISTRIBUTIONS = ("pyxs", "python-daemon", "structlog", "rich", "argon2-cffi", "matplotlib", "zstandard")
_DEVD_UNITS = ("xl-devd.service", "xendriverdomain.service")  # docs/driver-domains.md
_OF_PROCESS = ("status", "limits", "wchan", "io", "sched")
_OF_KERNEL = ("xen", "blk", "loop", "nvme", "i/o error", "nfs", "ceph", "rbd", "nbd", "device-mapper", "ext4", "xfs",
              "oom", "out of memory", "hung task", "blocked for more")  # fmt: skip
_STORE_S = 4.0  # for reading xenstore's nodes
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a report. `problem` says why it has no text; `left_out` bytes are missing at its beginning."""

    name: str
    text: str = ""
    problem: str = ""
    left_out: int = 0


def gather(wanted: Wanted, log: Path) -> list[Piece]:
    """Return all pieces, with secrets masked; a missing piece says why. Raises nothing, and ends in seconds.

    `log` is the service's log file, which is used if systemd does not manage this host.
    """
    findings = json.dumps([asdict(each) for each in examine(wanted)], indent=1)
    known = partial(call, wanted.control, timeout_s=LIMIT_S / 2)
    place = here()
    looks: dict[str, Callable[[], str | _Rest]] = {
        "version.txt": _versions,
        "status.json": lambda: _json(known({"verb": "status"}).data),
        "service.json": lambda: _json(known({"verb": "ping"}).data),
        "orders.json": lambda: _json(known({"verb": "orders"}).data),
        "settings.json": lambda: _json(_settings(wanted.config)),
        "unit.json": lambda: _json(activate.unit_facts(LIMIT_S / 2)),
        "processes.txt": lambda: _processes(known),
        "xenstore.txt": lambda: _xenstore(wanted),
        "service.log": lambda: _log(log),
        "kernel.log": _kernel,
        "xl-info.txt": lambda: _of_dom0(place, "xl", "info"),
        "xl-list.txt": lambda: _of_dom0(place, "xl", "list"),
        "xl-dmesg.txt": lambda: _without_command_line(_of_dom0(place, "xl", "dmesg")),
    }
    if place.is_guest:
        looks["devd.log"] = lambda: _journal(*_DEVD_UNITS)
    probes = [Probe(name, name, partial(_as_result, name, look)) for name, look in looks.items()]
    found = [Piece("doctor.json", scrub(findings))]
    for probe, result in zip(probes, run(probes, limit_s=LIMIT_S, all_s=3 * LIMIT_S), strict=True):
        if result.data is None:
            found.append(Piece(probe.check, problem=scrub(result.findings[0].sentence)))
        else:
            found.append(Piece(probe.check, scrub(result.data["text"]), left_out=result.data["left_out"]))
    return found


@dataclass(frozen=True, slots=True)
class _Rest:
    """The rest of a text whose first `left_out` bytes are missing."""

    text: str
    left_out: int

    def latest(self) -> _Rest:
        """Return the part that is kept: whole lines, after a line that says how much is missing."""
        text, left_out = self.text, self.left_out
        if len(text) > MOST:
            left_out += len(text[:-MOST].encode(errors="replace"))
            text = text[-MOST:]
        if not left_out:
            return self
        line, _, text = text.partition("\n")  # the first line may be incomplete
        left_out += len(line.encode(errors="replace")) + 1
        return _Rest(f"(the first {left_out} bytes are left out)\n{text}", left_out)


def _as_result(name: str, look: Callable[[], str | _Rest]) -> Result:
    try:
        text = look()
        return Result(data=asdict((text if isinstance(text, _Rest) else _Rest(text, 0)).latest()))
    except XenbackendError as problem:
        return Result([unknown(name, str(problem))])
    except OSError as error:
        return Result([unknown(name, f"{error.filename}: {error.strerror}")])


def _json(values: Any) -> str:
    return json.dumps(values, indent=1)


def _versions() -> str:
    system = platform.freedesktop_os_release()
    lines = [
        f"xenbackend {__version__}", f"Python {sys.version}", f"kernel {platform.release()} {platform.machine()}",
        f"system {system.get('PRETTY_NAME', '')}", f"user {os.geteuid()}",
    ]  # fmt: skip
    for name in _DISTRIBUTIONS:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} is not installed")
    for name in ("sys/hypervisor/version/major", "sys/hypervisor/version/minor", "proc/xen/capabilities"):
        with_text = Path("/") / name
        lines.append(f"{with_text}: {with_text.read_text().strip() if with_text.exists() else 'is not there'}")
    return "\n".join(lines) + "\n"


def _settings(config: Path | None) -> Mapping[str, Any]:
    try:
        return asdict(settings.load(config, {}))
    except settings.SettingsError as error:
        return {"mistakes": error.mistakes}
    except ConfigError as error:
        return {"mistakes": [str(error)]}


def _processes(known: Callable[..., Any]) -> str:
    """Return what /proc says about the service and its workers."""
    service = known({"verb": "ping"}).data["pid"]
    workers = {each["worker"]: each["vbd"] for each in known({"verb": "status"}).data if each["worker"]}
    parts = []
    for pid, name in {service: "the service", **workers}.items():
        for file in _OF_PROCESS:
            try:
                text = (_PROC / str(pid) / file).read_text(errors="replace")
            except OSError as error:
                text = f"{error.strerror}\n"
            parts.append(f"## {name}, process {pid}, {file}\n{text.rstrip()}\n")
    return "\n".join(parts)


def _xenstore(wanted: Wanted) -> str:
    """Return the nodes of our disks in xenstore, whether or not a service runs."""
    known = service.look(wanted.control).data
    chosen = load_or_default(wanted.config)
    address = wanted.store or (known["service"]["store"] if known else chosen.store) or find_address()
    with Store(address, timeout_s=_STORE_S / 2) as store:
        return nodes.text(store, chosen.kinds, _STORE_S)


def _log(file: Path) -> str | _Rest:
    """Return the end of the service's log: from the journal, or from the file that `run --detach` writes."""
    if activate.is_possible():
        return _journal(UNIT)
    with file.open("rb") as stream:
        begin = max(0, file.stat().st_size - MOST)
        stream.seek(begin)
        return _Rest(stream.read().decode(errors="replace"), begin)


def _journal(*units: str) -> str:
    """Return the last lines of the journal of these units."""
    words = ("--lines", str(_LINES), "--no-pager", "--output", "short-iso")
    text = _output("journalctl", *(f"--unit={each}" for each in units), *words)
    if text.count("\n") < _LINES:
        return text
    return f"(the latest {_LINES} lines; the journal may have more)\n{text}"


def _kernel() -> str:
    lines = _output("dmesg", "--ctime").splitlines()
    chosen = [line for line in lines if any(word in line.lower() for word in _OF_KERNEL)]
    return _without_command_line("\n".join(chosen))


def _without_command_line(text: str) -> str:
    """Return a text without its lines that contain a kernel command line, which may have anything in it."""
    return "\n".join(line for line in text.splitlines() if "command line" not in line.lower()) + "\n"


def _of_dom0(place: Place, *command: str) -> str:
    """Return the output of a command that only dom0 can run. Raises: ConfigError."""
    if place.is_guest:
        raise ConfigError(f"this is a driver domain, and only dom0 can tell; run there: {' '.join(command)}")
    return _output(*command)


def _output(*command: str) -> str:
    """Return the output of a command. Raises: ConfigError if it cannot be run, or fails."""
    words: Sequence[str] = command
    try:
        result = subprocess.run(  # noqa: S603 - the commands above
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror}") from None
    if result.returncode:
        said = result.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"{' '.join(command)} ended with {result.returncode}: {said}")
    return result.stdout
