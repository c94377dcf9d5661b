"""Tests of `xenbackend.kernel.fence`.

Its effect on memory is not tested: a call of any Python function takes so long that no race would show.
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
    """On a machine that reorders more, a library makes the fence, and the text names it."""
    if ctypes.util.find_library("atomic") is None:
        pytest.skip("no libatomic here")
    barrier, how = find_fence("aarch64")

    assert barrier() is None
    assert how == "atomic_thread_fence of libatomic.so.1"


def test_no_fence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fence the error says what to install; nothing continues without one."""
    monkeypatch.setattr(fence, "_LIBRARIES", (("libnothing.so.1", "atomic_thread_fence"),))

    with pytest.raises(KernelError, match="fence for riscv64"):
        find_fence("riscv64")


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", True), ("aarch64", False), ("riscv64", False)])
def test_only_x86_keeps_its_order(machine: str, *, expected: bool) -> None:
    """Loads stay in order among loads, and stores among stores, only on x86, as far as we know."""
    assert expected is fence.is_strongly_ordered(machine)
