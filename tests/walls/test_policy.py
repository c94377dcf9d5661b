"""Policies: files that a person reads, and mistakes in them named by their line."""

from __future__ import annotations

import errno

import pytest

from xenbackend.block.driver import NEEDS
from xenbackend.errors import ConfigError
from xenbackend.walls import policy
from xenbackend.walls.policy import DIRECTORY, WORKER, Policy, Rule, Test, load, parse

Test.__test__ = False  # type: ignore[attr-defined]  # a class of policies, not of tests
NEVER = {  # what no worker of any kind may do
    "execve", "execveat", "fork", "vfork", "ptrace", "kill", "tkill", "tgkill", "pidfd_open", "mount", "unshare",
    "setns", "io_uring_setup", "io_uring_register", "socketpair", "chroot", "bpf", "keyctl", "userfaultfd", "setuid",
    "capset",
}  # fmt: skip


def test_there_is_a_policy_for_each_need() -> None:
    """A driver can declare exactly what there is a policy for."""
    assert {WORKER, *NEEDS} == {file.stem for file in DIRECTORY.iterdir()}


@pytest.mark.parametrize("kinds", [[WORKER], [WORKER, *sorted(NEEDS)]])
def test_no_policy_lets_a_process_out(kinds: list[str]) -> None:
    """However much a driver needs, it starts no program, touches no process, and makes no ring."""
    assert set() == NEVER & load(kinds).keys()


def test_only_what_needs_files_opens_some() -> None:
    """The worker of any other disk gets its descriptors, and opens nothing."""
    assert not {"open", "openat", "connect", "socket"} & load([WORKER]).keys()
    assert "openat" not in load([WORKER, "network"])
    assert "socket" not in load([WORKER, "files"])


def test_cephs_library_needs_little() -> None:
    """Beside the network it makes event loops and pipes, and no connection by itself."""
    assert {"epoll_create", "pipe2"} == load([WORKER, "ceph"]).keys() - load([WORKER]).keys()


def test_a_line_is_a_call_and_a_condition() -> None:
    """Always, on an argument's value or bits, or refused by another error; a call may have several lines."""
    found: Policy = {}
    parse(
        "read  # all of it\n\nioctl arg1 in FIONBIO FIOCLEX\nioctl no ENOTTY\nmmap arg2 lacks PROT_EXEC\n", "p", found
    )

    assert {
        "read": Rule([None]),
        "ioctl": Rule([Test(1, is_in=True, values=(0x5421, 0x5451))], errno.ENOTTY),
        "mmap": Rule([Test(2, is_in=False, values=(4,))]),
    } == found


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("raed", "raed is not a known system call"),
        ("read arg0 in STDIN", "STDIN is not a known value"),
        ("read arg6 in FIONBIO", "'arg6 in FIONBIO' is not a condition"),
        ("read arg0 is FIONBIO", "is not a condition"),
        ("read arg0 in", "is not a condition"),
        ("read no EWHAT", "is not a condition"),
    ],
)
def test_a_mistake_is_named_by_its_line(line: str, problem: str) -> None:
    """Who writes a policy is told where it is wrong, and nothing is allowed by mistake."""
    with pytest.raises(ConfigError, match=rf"my\.policy:2: .*{problem}"):
        parse(f"write\n{line}\n", "my.policy", {})


def test_a_policy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without its policies says which file is missing."""
    monkeypatch.setattr(policy, "DIRECTORY", DIRECTORY / "gone")

    with pytest.raises(ConfigError, match=r"gone/worker\.policy: there is no such policy"):
        load([WORKER])
