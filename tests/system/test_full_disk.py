"""If the file system below a guest's disk fills up, the guest waits, and goes on when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.until import until
from xenbackend.blkif.abi import BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

pytestmark = pytest.mark.slow
PATIENCE_S = 20.0
PAGE = 4096


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, half of which the file `ballast` takes."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", place], check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        (place / "ballast").write_bytes(bytes(512 << 10))
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_no_space_is_a_pause(small: Path) -> None:
    """ENOSPC is reported once, in status, xenstore and log; reads go on, and delayed writes succeed later."""
    image = small / "image"
    image.touch()
    os.truncate(image, 2 << 20)
    with Machine() as machine, closing(machine.create_guest(5)) as guest:

        def known() -> dict[str, Any]:
            return dict(machine.ask({"verb": "status"})["data"][0])

        path = machine.attach(5, "xvda", f"aio:{image}")
        frontend = guest.connect(path, Wishes(persistent=True))
        writes = [frontend.submit(BLKIF_OP_WRITE, 88 * n, data=bytes([n + 1]) * 11 * PAGE) for n in range(20)]
        until(lambda: known()["error"])
        until(
            lambda: "tries again" in (machine.store.read_optional(f"/local/domain/0/error/backend/{path}/error") or "")
        )
        frontend.poll()
        waiting = [write for write in writes if write.status is None]
        reads = [frontend.submit(BLKIF_OP_READ, 0, 8)]
        frontend.wait(reads)
        told = [line for line in machine.log.read_text().splitlines() if "No space left" in line and "critical" in line]
        (small / "ballast").unlink()
        frontend.wait(writes, PATIENCE_S)
        until(lambda: not known()["error"])

        assert waiting
        assert "No space left" in told[0]
        assert 1 == len(told)
        assert [BLKIF_RSP_OKAY] * 21 == [each.status for each in writes + reads]
        assert [bytes([n + 1]) * PAGE for n in range(20)] == [frontend.read(88 * n + 80, 8) for n in range(20)]
        frontend.close()


def test_the_policy_may_report_it(small: Path) -> None:
    """With the policy `enospc=report` the guest gets the error at once."""
    image = small / "image"
    image.touch()
    os.truncate(image, 2 << 20)
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{image}"), Wishes())
        machine.ask({"verb": "policy", "vbd": "5/xvda", "policy": "enospc=report"})
        writes = [frontend.submit(BLKIF_OP_WRITE, 88 * n, data=bytes(11 * PAGE)) for n in range(20)]
        frontend.wait(writes)

        assert {BLKIF_RSP_OKAY, BLKIF_RSP_ERROR} == {write.status for write in writes}
        frontend.close()
