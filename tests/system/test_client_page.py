"""The programs of docs/client.md, one after the other, against a service on a simulated host."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import pages
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

PAGE = pages.ROOT / "docs/client.md"


@pytest.mark.slow
def test_the_programs_of_the_page_do_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program of the page continues where the one before ended; the environment names the socket."""
    (tmp_path / "guest.raw").write_bytes(bytes(1 << 20))
    names: dict[str, Any] = {}
    with Machine() as machine, closing(machine.create_guest(5)) as guest:
        monkeypatch.setenv("XENBACKEND_SOCKET", machine.control)
        frontend = guest.connect(machine.attach(5, "xvda", f"aio:{tmp_path}/guest.raw"), Wishes())
        for block in pages.blocks(PAGE):
            if block.language == "python":
                exec(compile(block.text.replace("/img/", f"{tmp_path}/"), "client.md", "exec"), names)  # noqa: S102 - our page
        chain = names["service"].disk("5/xvda").chain
        frontend.crash()
    said = capsys.readouterr().out

    assert said.startswith(f"5/xvda guest-5 Connected aio:{tmp_path}/guest.raw 0\n")
    assert f"log:|throttle:iops=500|qcow2:{tmp_path}/monday.qcow2" == chain
