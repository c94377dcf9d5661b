"""Makes a running host use the installed files, or stop using them: systemd and udev, step by step.

Must not write a file.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from xenbackend.errors import XenbackendError
from xenbackend.host.files import SYSUSERS, UNIT

Command = tuple[str, ...]
Tell = Callable[[Command], None]  # called after each step

_RELOAD_UNITS = ("systemctl", "daemon-reload")
_RELOAD_RULES = ("udevadm", "control", "--reload")
_APPLY_RULES = ("udevadm", "trigger", "--settle", "--subsystem-match=misc", "--sysname-match=xen!*")
_FACTS = (
    "LoadState", "ActiveState", "Result", "StatusText", "MainPID", "ConditionResult", "ConditionTimestampMonotonic",
    "NFileDescriptorStore", "FileDescriptorStoreMax",
)  # fmt: skip
_TIMEOUT_S = 180  # a service that stops first finishes what is in flight


def is_possible() -> bool:
    """Return whether systemd manages this host (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def is_serving() -> bool:
    """Return whether the service is active."""
    result = subprocess.run(["systemctl", "is-active", "--quiet", UNIT], check=False)  # noqa: S603, S607 - root's PATH
    return result.returncode == 0


def unit_facts(limit_s: float) -> dict[str, str]:
    """Return properties of our unit; empty if systemd does not manage this host, or does not answer in `limit_s`.

    Source: org.freedesktop.systemd1(5).
    """
    command = ["systemctl", "show", UNIT, "--property", ",".join(_FACTS)]
    try:
        if not is_possible():
            return {}
        result = subprocess.run(  # noqa: S603 - the command above
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


def starting(*, starts: bool) -> list[Command]:
    """Return the steps after files were installed. Without `starts`, the service starts at the next boot only."""
    enable = ("systemctl", "enable", *(["--now"] if starts else []), UNIT)
    return [("systemd-sysusers", SYSUSERS), _RELOAD_RULES, _APPLY_RULES, _RELOAD_UNITS, enable]


def stopping() -> list[Command]:
    """Return the steps before files are removed."""
    return [("systemctl", "disable", "--now", UNIT)]


def forgetting() -> list[Command]:
    """Return the steps after files were removed. Devices keep their group until udev creates them again."""
    return [_RELOAD_RULES, _RELOAD_UNITS]


def run(steps: Sequence[Command], tell: Tell) -> None:
    """Run the steps in order; all of them may be repeated. Raises: XenbackendError at the first one that fails."""
    for step in steps:
        _run(step)
        tell(step)


def _run(step: Command) -> None:
    try:
        result = subprocess.run(  # noqa: S603 - the commands above
            step, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise XenbackendError(f"{step[0]} is not installed; install it and run the command again") from None
    except subprocess.TimeoutExpired:
        raise XenbackendError(f"{' '.join(step)} did not end within {_TIMEOUT_S} s") from None
    if result.returncode:
        reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[0].rstrip(".")
        hint = f"; see: journalctl -u {UNIT}" if "--now" in step else ""
        raise XenbackendError(f"{' '.join(step)} failed: {reason}{hint}")
