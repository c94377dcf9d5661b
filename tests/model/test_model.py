"""The model in small, and what it must find; at length it is `make test-model`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.wrong import WRONG

_ROOT = Path(__file__).parents[2]


def model(*arguments: str) -> tuple[int, str]:
    """Return the exit status of the model, and its report."""
    command = [sys.executable, "-m", "tests.model", "--jobs", "1", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_what_is_said_is_true(request: pytest.FixtureRequest) -> None:
    """Whoever orders what, and whatever dies meanwhile: every reply is true, and in the end all know the same."""
    status, report = model("--orders", "250", "--seed", str(request.config.getoption("--seed")))

    assert 0 == status, report


@pytest.mark.slow
def test_a_run_can_be_done_again() -> None:
    """The same seed chooses the same: what has failed fails again, at the same step."""
    first, second = (model("--seed", "3", "--run", "7", "--wrong", "the race") for _ in range(2))

    assert 1 == first[0]
    assert _without_time(first[1]) == _without_time(second[1])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_known_to_be_wrong_is_found(request: pytest.FixtureRequest, wrong: str) -> None:
    """Each way to get it wrong, most of which were faults of ours, is found within some thousand orders."""
    if not request.config.getoption("--long"):
        pytest.skip("takes a minute; --long, or make test-model")
    status, report = model("--wrong", wrong, "--orders", "10000")

    assert 1 == status, report
    assert "--run" in report
    assert [] == [each for each in ("AttributeError", "TypeError") if each in report]  # the change fits what it changes


def _without_time(report: str) -> str:
    return report.rpartition(" in ")[0]
