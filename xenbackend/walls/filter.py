"""Compiles policies into programs for the kernel's filter of system calls (classic BPF).

Must not load a program, nor allow a call that its policy does not allow.

A program searches for the number of the call from the top, so the first calls of a policy are the fastest. The kernel
remembers which numbers are always allowed (Linux 5.11), and does not run the program for those.

Source: linux/filter.h, linux/bpf_common.h, linux/seccomp.h (struct seccomp_data: number, machine, instruction pointer,
six arguments of 64 bits, all little-endian on the architectures in `walls.calls`).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from xenbackend.errors import KernelError
from xenbackend.walls.calls import MACHINES, NUMBERS
from xenbackend.walls.policy import Policy, Rule, Test

LOAD, EQUAL, GREATER_OR_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO, _KILL_PROCESS
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16
_INSTRUCTION = struct.Struct("=HBBI")  # code, jump if true, jump if false, operand
_X32 = 0x40000000  # marks calls of the x32 ABI, which uses the same numbers for other calls

Instruction = tuple[int, int, int, int]


def compile_policy(policy: Policy, machine: str) -> bytes:
    """Return the program for a policy on a machine, a name as in `uname -m`.

    A call that no rule allows is refused with EPERM; a call through another architecture's interface ends the process.

    Raises: KernelError; ENOSYS for a machine whose numbers are not known.
    """
    if machine not in MACHINES:
        raise KernelError(f"filter system calls on {machine}, whose numbers are not known", errno.ENOSYS)
    program: list[Instruction] = [
        (LOAD, 0, 0, MACHINE_AT),
        (EQUAL, 1, 0, MACHINES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":
        program += [(GREATER_OR_EQUAL, 0, 1, _X32), (RETURN, 0, 0, KILL)]
    for name, rule in policy.items():
        number = NUMBERS[machine][name]
        if number is not None:
            block = _block(rule)
            program += [(EQUAL, 0, len(block), number), *block]
    program.append((RETURN, 0, 0, REFUSE | errno.EPERM))
    return b"".join(_INSTRUCTION.pack(*each) for each in program)


def _block(rule: Rule) -> list[Instruction]:
    """Return the instructions that decide about one call; they always end with a verdict."""
    if None in rule.tests:
        return [(RETURN, 0, 0, ALLOW)]
    tests = [each for each in rule.tests if each is not None]
    block = [instruction for test in tests for instruction in _test(test)]
    return [*block, (RETURN, 0, 0, REFUSE | rule.errno)]


def _test(test: Test) -> Iterable[Instruction]:
    """Yield instructions that allow the call if the test holds, and otherwise continue behind them."""
    yield (LOAD, 0, 0, ARGUMENTS_AT + 8 * test.argument)
    if test.is_in:
        for place, value in enumerate(test.values, 1):
            left = len(test.values) - place
            yield (EQUAL, left, 0 if left else 1, value)
    else:
        bits = 0
        for value in test.values:
            bits |= value
        yield (ANY_BIT, 1, 0, bits)
    yield (RETURN, 0, 0, ALLOW)
