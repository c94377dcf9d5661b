"""Policies: files that a person reads, and mistakes in them named by their line."""

from __future__ import annotations

import errno

import pytest

from xenbackend.block.driver import NEEDS
from xenbackend.errors import ConfigError
from xenbackend.walls import policy
from xenbackend.walls.policy import DIRECTORY, WORKER, Policy, Rule, Test, load, parse

Test.__test__ = False
NEVER = {  # calls that no worker may make
    "execve", "execveat", "fork", "vfork", "ptrace", "kill", "tkill", "tgkill", "pidfd_open", "mount", "unshare",
    "setns", "io_setup", "io_uring_setup", "io_uring_register", "socketpair", "chroot", "bpf", "keyctl", "userfaultfd",
    "setuid", "capset",
}  # fmt: skip


def test_there_is_a_policy_for_each_need() -> None:
    """There is a policy for each need that a driver can declare, and no other."""
    assert {WORKER, *NEEDS} == {file.stem for file in DIRECTORY.iterdir()}


@pytest.mark.parametrize("kinds", [[WORKER], [WORKER, *sorted(NEEDS)]])
def test_no_policy_lets_a_process_out(kinds: list[str]) -> None:
    """No policy, not even all together, allows to start a program, touch another process or make a ring."""
    assert set() == NEVER & load(kinds).keys()


def test_only_what_needs_files_opens_some() -> None:
    """Only a driver that needs files may open some; all other workers get their descriptors."""
    assert not {"open", "openat", "connect", "socket"} & load([WORKER]).keys()
    assert "openat" not in load([WORKER, "network"])
    assert "socket" not in load([WORKER, "files"])


def test_cephs_library_needs_little() -> None:
    """Apart from the network, Ceph's library needs only event loops and pipes."""
    assert {"epoll_create", "pipe2"} == load([WORKER, "ceph"]).keys() - load([WORKER]).keys()


def test_a_line_is_a_call_and_a_condition() -> None:
    """A line allows a call always, or by an argument's value or bits, or sets its error; a call may have several."""
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
    """A mistake is reported with its file and line."""
    with pytest.raises(ConfigError, match=rf"my\.policy:2: .*{problem}"):
        parse(f"write\n{line}\n", "my.policy", {})


def test_a_policy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a policy's file is missing, the error names it."""
    monkeypatch.setattr(policy, "DIRECTORY", DIRECTORY / "gone")

    with pytest.raises(ConfigError, match=r"gone/worker\.policy: there is no such policy"):
        load([WORKER])
