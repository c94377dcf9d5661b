"""The files that are installed on a Xen host: their content and their places.

Must not write anything.

The unit and the udev rules are at the top of a checkout, and in `files/` of an installed package. The hotplug script is
a module of this room that can run alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from xenbackend import settings_file
from xenbackend.host.example import example
from xenbackend.host.program import PACKAGED, Program
from xenbackend.xl.shim import SHIM_PLACE, shim_text

UNIT = "xenbackend.service"
SYSUSERS = "xenbackend.conf"
SCRIPTS = "/etc/xen/scripts"
GROUP_FILE = "# Members may open Xen's grant and event channel devices: see 60-xenbackend.rules.\ng xenbackend -\n"

_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[1]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to install: a file with a mode, or a symbolic link to `link`; `path` is absolute within the root."""

    path: str
    content: bytes = b""
    mode: int = 0o644
    link: str = ""
    is_config: bool = False  # belongs to the admin once it was changed

    @property
    def fingerprint(self) -> str:
        """The value that `Tree.fingerprint` returns once the item is installed."""
        return fingerprint_of_link(self.link) if self.link else fingerprint_of_file(self.content)


def fingerprint_of_file(content: bytes) -> str:
    """Return the fingerprint of a file's content."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def fingerprint_of_link(target: str) -> str:
    """Return the fingerprint of a symbolic link."""
    return f"link:{target}"


def items(program: Program) -> list[Item]:
    """Return all items for a program: in the places for a distribution's packages, or else in those for the admin."""
    is_packaged = program == PACKAGED
    units, rules, users = (
        ("/lib/systemd/system", "/lib/udev/rules.d", "/usr/lib/sysusers.d")
        if is_packaged
        else ("/etc/systemd/system", "/etc/udev/rules.d", "/etc/sysusers.d")
    )
    return [
        Item(f"{SCRIPTS}/block-xenbackend", _hotplug_script(program), mode=0o755),
        Item(f"{SCRIPTS}/tap2", link="block-xenbackend"),
        Item(f"{users}/{SYSUSERS}", GROUP_FILE.encode()),
        Item(f"{rules}/60-xenbackend.rules", _source("udev", "60-xenbackend.rules")),
        Item(f"{units}/{UNIT}", _source("systemd", UNIT).replace(PACKAGED.command.encode(), program.command.encode())),
        Item(str(settings_file.PATH), example().encode(), is_config=True),
    ]


def shim(program: Program, xl: str) -> Item:
    """Return the file that makes plain `xl` understand blktap2's disk lines; `xl` is the path of the real xl."""
    return Item(SHIM_PLACE, shim_text(xl, *program.command.split()).encode(), mode=0o755)


def script_text() -> bytes:
    """Return the hotplug script without its first line, which names the interpreter."""
    return (_HERE / "block_xenbackend.py").read_bytes().partition(b"\n")[2]


def _hotplug_script(program: Program) -> bytes:
    """Return the script for the program's interpreter: when libxl runs it, it has no environment to find another."""
    first, _, rest = (_HERE / "block_xenbackend.py").read_bytes().partition(b"\n")
    return first.replace(PACKAGED.python.encode(), program.python.encode()) + b"\n" + rest


def _source(directory: str, name: str) -> bytes:
    packaged = _HERE / "files" / name
    return (packaged if packaged.exists() else _CHECKOUT / directory / name).read_bytes()
