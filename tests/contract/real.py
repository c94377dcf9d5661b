"""Where a real Xen is missing, which the contract is tried on beside the simulated one."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

_CAPABILITIES = Path("/proc/xen/capabilities")


def is_missing(reason: str) -> NoReturn:
    """Skip a test for this reason; in the dom0 of a real Xen, where all of it is to be had, it is a failure."""
    if _CAPABILITIES.is_file() and "control_d" in _CAPABILITIES.read_text():
        pytest.fail(f"{reason}, and this is a dom0", pytrace=False)
    pytest.skip(reason)
