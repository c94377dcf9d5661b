"""The codes, and the exit status of each."""

from __future__ import annotations

from xenbackend.protocol.codes import EXIT_STATUS, Code


def test_each_code_has_an_exit_status() -> None:
    """Exit status 0 means done, 2 a mistake that changed nothing, 75 that it may still be done, and 1 anything else."""
    assert set(Code) == set(EXIT_STATUS)
    assert {Code.OK: 0, Code.INVALID: 2, Code.UNDER_WAY: 75} == {
        code: status for code, status in EXIT_STATUS.items() if status != 1
    }
