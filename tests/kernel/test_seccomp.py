"""Seccomp: a program holds for every thread, for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import seccomp

_FILTERED = """
import os, threading
from xenbackend.kernel import privileges, seccomp
from xenbackend.walls import filter, policy
import platform
begun, go = threading.Event(), threading.Event()
said = []
def ask():
    begun.set()
    go.wait()
    try:
        os.setpgid(0, 0)
    except OSError as error:
        said.append(error.strerror)
thread = threading.Thread(target=ask)
thread.start()
begun.wait()
privileges.refuse_new_privileges()
seccomp.load(filter.compile_policy(policy.load(["worker"]), platform.machine()))
go.set()
thread.join()
print(said, os.getpid() > 0)
"""


def test_a_program_holds_for_threads_that_run_already() -> None:
    """A thread that was running before is bound by the program as well."""
    done = subprocess.run([sys.executable, "-c", _FILTERED], check=True, capture_output=True, text=True, timeout=20)

    assert "['Operation not permitted'] True\n" == done.stdout


def test_what_is_no_program_is_refused() -> None:
    """If the kernel does not accept the program, its answer is raised, and nothing is filtered."""
    with pytest.raises(KernelError, match=r"filter system calls \(seccomp\)"):
        seccomp.load(bytes(seccomp.INSTRUCTION))


def test_another_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose number of seccomp(2) is unknown, nothing is called."""
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")

    with pytest.raises(KernelError, match="filter system calls on riscv64: Function not implemented"):
        seccomp.load(b"")
