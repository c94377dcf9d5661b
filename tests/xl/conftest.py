"""What the tests of the step before xl share: xl's own parser."""

from __future__ import annotations

import pytest

from tests.tools import xlu


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> xlu.Xlu:
    """Return xl's own parser."""
    if not xlu.can_compile():
        pytest.skip("no gcc or libxen-dev here")
    return xlu.Xlu(tmp_path_factory.mktemp("xlu"))
