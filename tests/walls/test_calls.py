"""The numbers of system calls and arguments, against the headers of the machine that the test runs on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xenbackend.walls.calls import NUMBERS, VALUES
from xenbackend.walls.policy import DIRECTORY

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine: str) -> None:
    """Each call in a policy has the number of the kernel's own header, or none if the header has none."""
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    found = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text())
    }
    if machine == "aarch64":
        found["newfstatat"] = found.pop("fstatat")
    ours = NUMBERS[machine]

    assert {name: found.get(name) for name in ours} == ours


def test_nothing_is_named_in_vain() -> None:
    """Every name with a number is used by a policy."""
    words = {
        word
        for file in DIRECTORY.iterdir()
        for line in file.read_text().splitlines()
        for word in line.partition("#")[0].split()
    }

    assert {*NUMBERS["x86_64"], *VALUES} <= words
