"""Whether the host has an idle CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xenbackend.kernel import cpu


def test_a_host_with_more_threads_than_cpus_is_busy() -> None:
    """With more threads that want to run than there are CPUs, none is idle."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        for _ in range((os.cpu_count() or 1) + 1)
    ]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()
        answers = {cpu.has_idle_cpu() for _ in range(20)}
    finally:
        for process in busy:
            process.kill()
            process.communicate()

    assert answers == {False}


def test_a_host_with_as_many_cpus_as_threads_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many CPUs as runnable threads is enough: one of those threads is the one that asks."""
    monkeypatch.setattr(cpu, "_CPUS", 1 << 20)

    assert cpu.has_idle_cpu() is True
