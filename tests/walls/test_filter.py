"""Filters: what a program answers to each call, by an interpreter of the few instructions that it uses."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from xenbackend.errors import KernelError
from xenbackend.kernel.seccomp import MAX_INSTRUCTIONS
from xenbackend.walls import filter as filters
from xenbackend.walls.calls import MACHINES, NUMBERS, VALUES
from xenbackend.walls.filter import ALLOW, KILL, REFUSE, compile_policy
from xenbackend.walls.policy import WORKER, load

REFUSED = REFUSE | errno.EPERM


def answer(program: bytes, machine: int, number: int, *arguments: int) -> int:
    """Return what the kernel would get from a program. Source: Linux, kernel/bpf, classic BPF as of filter(7)."""
    data = struct.pack("=IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = [*struct.iter_unpack("=HBBI", program)]
    place = loaded = 0
    while True:
        code, if_true, if_false, operand = instructions[place]
        place += 1
        match code:
            case filters.LOAD:
                (loaded,) = struct.unpack_from("=I", data, operand)
            case filters.RETURN:
                return int(operand)
            case filters.EQUAL:
                place += if_true if loaded == operand else if_false
            case filters.GREATER_OR_EQUAL:
                place += if_true if loaded >= operand else if_false
            case filters.ANY_BIT:
                place += if_true if loaded & operand else if_false
            case _:
                raise AssertionError(f"{code:#x} is no instruction of ours")


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    """Each machine that we know."""
    return str(request.param)


def test_what_a_policy_names_is_allowed_and_nothing_else(machine: str) -> None:
    """Exactly the calls that a policy names without a condition are allowed with any arguments."""
    policy = load([WORKER])
    program = compile_policy(policy, machine)
    allowed = {
        number for number in range(1024) if answer(program, MACHINES[machine], number, *[0xFFFFFFFF] * 6) == ALLOW
    }

    always = {NUMBERS[machine][name] for name, rule in policy.items() if None in rule.tests} - {None}
    assert always == allowed
    assert len(program) // 8 < MAX_INSTRUCTIONS


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("mmap", (0, 4096, 3), ALLOW),
        ("mmap", (0, 4096, 7), REFUSED),
        ("mprotect", (0, 4096, 5), REFUSED),
        ("clone", (0x3D0F00,), ALLOW),
        ("clone", (0x3D0F00 | 0x10000000,), REFUSED),  # a new user namespace
        ("clone", (17,), REFUSED),  # fork
        ("clone3", (), REFUSE | errno.ENOSYS),
        ("ioctl", (3, VALUES["EVTCHN_NOTIFY"]), ALLOW),
        ("ioctl", (3, VALUES["BLKDISCARD"]), ALLOW),
        ("ioctl", (3, VALUES["FIONCLEX"]), ALLOW),
        ("ioctl", (3, 0x5412), REFUSE | errno.ENOTTY),  # TIOCSTI
        ("ioctl", (3, 1 << 32 | VALUES["EVTCHN_NOTIFY"]), ALLOW),  # the kernel looks at the lower half only
        ("fcntl", (3, VALUES["F_SETFL"]), ALLOW),
        ("fcntl", (3, 8), REFUSED),  # F_SETOWN
        ("prlimit64", (0,), ALLOW),
        ("prlimit64", (1,), REFUSED),
        ("sendmsg", (3,), REFUSED),  # which could send descriptors
        ("setsockopt", (3, 1, VALUES["SO_SNDBUF"]), REFUSED),
    ],
)
def test_arguments_decide(machine: str, call: str, arguments: tuple[int, ...], expected: int) -> None:
    """A condition is tested on its own argument; a call that fails it is refused with the call's error."""
    program = compile_policy(load([WORKER]), machine)

    assert expected == answer(program, MACHINES[machine], NUMBERS[machine][call] or 0, *arguments)


def test_a_need_adds_to_what_is_allowed_before() -> None:
    """If two policies name one call, it is allowed if either allows it."""
    program = compile_policy(load([WORKER, "network", "files"]), "x86_64")
    numbers = NUMBERS["x86_64"]

    def ask(call: str, *arguments: int) -> int:
        return answer(program, MACHINES["x86_64"], numbers[call] or 0, *arguments)

    assert [ALLOW, ALLOW] == [ask("setsockopt", 3, 6, VALUES["TCP_NODELAY"]), ask("socket", VALUES["AF_INET6"])]
    assert REFUSED == ask("setsockopt", 3, 1, socket.SO_LINGER)
    assert [REFUSED, REFUSED] == [ask("socket", 1), ask("socket", 16)]  # AF_UNIX, AF_NETLINK
    assert [ALLOW, REFUSED, REFUSED] == [ask("openat", 0, 0, flags) for flags in (0, 1, 0o100)]


def test_calls_of_another_machine_end_the_process() -> None:
    """Calls of another machine end the process, as their numbers mean other calls: 32-bit and x32."""
    program = compile_policy(load([WORKER]), "x86_64")

    assert KILL == answer(program, 0x40000003, NUMBERS["x86_64"]["read"] or 0)  # AUDIT_ARCH_I386
    assert KILL == answer(program, MACHINES["x86_64"], 0x40000000)


def test_a_machine_that_is_not_known_has_no_program() -> None:
    """For an unknown machine no program is made, and no number is guessed."""
    with pytest.raises(KernelError, match="riscv64, whose numbers are not known"):
        compile_policy({}, "riscv64")
