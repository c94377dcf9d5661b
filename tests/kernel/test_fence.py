"""Tests of `xenbackend.kernel.fence`.

That it orders memory is not tested here: a call of any Python function takes so long that a race no longer shows.
"""

import ctypes.util

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel import fence
from xenbackend.kernel.fence import find_fence


def test_x86_uses_a_lock() -> None:
    """On x86 a lock's acquire and release is the fence: it needs no library."""
    barrier, how = find_fence("x86_64")

    assert barrier() is None
    assert how.startswith("a lock")


def test_other_machines_use_a_library() -> None:
    """On a machine that reorders more, the fence is a library's, and the text says which."""
    if ctypes.util.find_library("atomic") is None:
        pytest.skip("no libatomic here")
    barrier, how = find_fence("aarch64")

    assert barrier() is None
    assert how == "atomic_thread_fence of libatomic.so.1"


def test_no_fence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no fence the error says what to install; there is no silent way on without one."""
    monkeypatch.setattr(fence, "_LIBRARIES", (("libnothing.so.1", "atomic_thread_fence"),))

    with pytest.raises(KernelError, match="fence for riscv64"):
        find_fence("riscv64")


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", True), ("aarch64", False), ("riscv64", False)])
def test_only_x86_keeps_its_order(machine: str, *, expected: bool) -> None:
    """Loads among loads and stores among stores stay in order on x86 and, for all we know, nowhere else."""
    assert expected is fence.is_strongly_ordered(machine)
