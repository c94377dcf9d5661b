"""What this process may do: tests that need a privilege are left out without it."""

from __future__ import annotations

from pathlib import Path

_CAP_SYS_NICE = 23  # linux/capability.h


def _effective() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))


MAY_COME_FIRST = bool(_effective() >> _CAP_SYS_NICE & 1)
