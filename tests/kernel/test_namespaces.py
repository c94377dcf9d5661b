"""Empty namespaces: a process in them sees no file, no network and no process; `tests/walls` has all walls together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from descriptors import open_descriptors

from xenbackend.errors import KernelError
from xenbackend.kernel import namespaces
from xenbackend.kernel.namespaces import EmptySet

_ENTERED = """
import os, socket, sys
from xenbackend.kernel.namespaces import EmptySet, new_pid_namespace
empty = EmptySet()
for number in range(2):
    near, far = os.pipe()
    if number: new_pid_namespace()
    child = os.fork()
    if child == 0:
        empty.enter()
        try:
            open("/made", "w")
        except OSError as error:
            os.write(far, repr((os.listdir("/"), os.getcwd(), error.strerror, os.getpid() == 1)).encode())
        os._exit(0)
    os.close(far)
    print(os.read(near, 1000).decode())
    os.waitpid(child, 0)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces")


@needs_root
def test_an_empty_set_is_entered_by_many() -> None:
    """Several processes enter one set and find an empty read-only root; one with a new pid namespace is number 1."""
    done = subprocess.run([sys.executable, "-c", _ENTERED], check=True, capture_output=True, text=True, timeout=20)

    there = "([], '/', 'Read-only file system', "
    assert [f"{there}False)", f"{there}True)"] == done.stdout.split("\n")[:2]


@needs_root
def test_nothing_is_left_of_a_set() -> None:
    """When a set is closed its descriptors are closed, and the process that made it has gone."""
    before = open_descriptors()
    empty = EmptySet()
    assert 4 == len(empty.descriptors)
    empty.close()
    empty.close()

    assert before == open_descriptors()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@needs_root
def test_who_may_not_make_them_hears_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """If namespaces cannot be made, the child's reason is raised as KernelError and no descriptor is left."""
    before = open_descriptors()
    monkeypatch.setattr(namespaces, "NETWORK", 2)  # no kind that unshare(2) knows

    with pytest.raises(KernelError, match="make empty namespaces: Invalid argument"):
        EmptySet()

    assert before == open_descriptors()
