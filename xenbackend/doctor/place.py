"""Where a look is made: in dom0, or in a driver domain, which has no xenstored, and whose xl knows no guests.

Must not say what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xenbackend.host import activate
from xenbackend.host.files import UNIT

_ROOT = Path("/")
CAPABILITIES = "proc/xen/capabilities"


@dataclass(frozen=True, slots=True)
class Place:
    """This domain, and the commands that help in it.

    is_guest      it is not dom0; if it serves disks, it is a driver domain
    has_systemd   systemd manages it
    """

    is_guest: bool = False
    has_systemd: bool = True

    @property
    def log(self) -> str:
        """The command that shows the service's log."""
        return f"journalctl -u {UNIT} -n 50" if self.has_systemd else "tail -n 50 /var/log/xenbackend.log"

    @property
    def xenstored(self) -> str:
        """The command that shows whether xenstored runs."""
        return self.in_dom0("systemctl status xenstored" if self.has_systemd else "pgrep -a xenstored")

    def in_dom0(self, command: str) -> str:
        """Return a command that only dom0 can run, with a remark to that effect in a driver domain."""
        return f"{command}  # in dom0" if self.is_guest else command


DOM0 = Place()


def here(root: Path = _ROOT) -> Place:
    """Return what this domain is. A system without Xen counts as dom0: it may become one, or have a simulated host."""
    try:
        is_guest = "control_d" not in (root / CAPABILITIES).read_text()
    except OSError:
        is_guest = False
    return Place(is_guest, activate.is_possible())
