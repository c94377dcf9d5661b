"""Privileges: what a process has dropped is gone, as root sees it in /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import privileges

_GIVEN_UP = """
from pathlib import Path
from xenbackend.kernel import privileges
privileges.become(1879048193)
privileges.drop_capabilities()
privileges.refuse_new_privileges()
privileges.refuse_dumps()
status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
keys = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs")
print([" ".join(status[key].split()) for key in keys])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_nothing_is_left() -> None:
    """Nothing is left but one user and group: no other group and no capability of any kind, now or later."""
    done = subprocess.run([sys.executable, "-c", _GIVEN_UP], check=True, capture_output=True, text=True, timeout=20)

    who, none = " ".join(["1879048193"] * 4), "0" * 16
    assert f"{[who, who, '', none, none, none, none, '1']}\n" == done.stdout


def test_what_is_refused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel refuses, the error says what was to be done."""

    def refuse(*_: int) -> None:
        raise PermissionError(1, "no")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(KernelError, match="become user 7: Operation not permitted"):
        privileges.become(7)
