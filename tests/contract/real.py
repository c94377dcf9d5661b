"""The Xen parts that this host lacks. With them, the contract tests run on a real Xen besides the simulated one."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

_CAPABILITIES = Path("/proc/xen/capabilities")


def is_missing(reason: str) -> NoReturn:
    """Skip a test for this reason. In the dom0 of a real Xen, which has everything that the tests need, fail it."""
    if _CAPABILITIES.is_file() and "control_d" in _CAPABILITIES.read_text():
        pytest.fail(f"{reason}, and this is a dom0", pytrace=False)
    pytest.skip(reason)
